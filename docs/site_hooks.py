"""What MkDocs does beyond its own for the site of these pages: see mkdocs.yml.

The pages are written to be read where they lie, beside the sources. Here README, CONTRIBUTING and CHANGELOG become
pages, and each file of the sources that a page links to goes along. Formulas, $x$ and $$x$$, become MathML, which
browsers show by themselves.
"""

import html
import os
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
TOP = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#])")
# a fence whose language is followed by words for the tests: those with a dot name a file
FENCE = re.compile(r"^( *```\w+) +(.+)$", re.MULTILINE)


def on_config(config: Any) -> None:
    lessons = sorted((ROOT / "docs/learn").glob("*.md"), key=lambda path: (path.name != "README.md", path.name))
    if lessons:
        config.nav.insert(2, {"Learn": [f"learn/{path.name}" for path in lessons]})


def on_files(files: Any, config: Any) -> None:
    for name, page in TOP.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    for file in list(files.documentation_pages()):
        for path in linked(file):
            if (ROOT / path).is_file() and files.get_file_from_path(place(path)) is None:
                files.append(File.generated(config, place(path), content=(ROOT / path).read_bytes()))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    here = source_of(page.file)

    def relinked(match: re.Match[str]) -> str:
        path = os.path.normpath(here.parent / match[1])
        return os.path.relpath(place(path), Path(page.file.src_uri).parent) if (ROOT / path).is_file() else match[1]

    def titled(match: re.Match[str]) -> str:
        return f'{match[1]} title="{match[2]}"' if "." in match[2] else match[1]

    return FENCE.sub(titled, LINK.sub(relinked, markdown))


def on_page_content(content: str, **_: Any) -> str:
    for tag, ends, display in (("span", (r"\\\(", r"\\\)"), "inline"), ("div", (r"\\\[", r"\\\]"), "block")):
        formula = re.compile(rf'<{tag} class="arithmatex">{ends[0]}(.*?){ends[1]}</{tag}>', re.DOTALL)
        content = formula.sub(lambda match, display=display: convert(html.unescape(match[1]), display=display), content)
    return content


def source_of(file: Any) -> Path:
    """Of a page, its file's path in the repository."""
    return Path(file.abs_src_path).relative_to(ROOT)


def linked(file: Any) -> set[str]:
    """The paths, in the repository, that a page links to."""
    here = source_of(file)
    return {os.path.normpath(here.parent / target) for target in LINK.findall((ROOT / here).read_text("utf-8"))}


def place(path: str) -> str:
    """Where a file of the repository is in the site."""
    if path in TOP:
        return TOP[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}.txt"
