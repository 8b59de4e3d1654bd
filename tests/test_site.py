"""The pages as a site, and where they lie: no warning, no dead link, no torn table, nothing from the network."""

import importlib.util
import os
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import markdown
import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.fixtures_cli import ROOT, python

TOP = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES = [*TOP, *sorted((ROOT / "docs").rglob("*.md"))]
READER = MarkdownIt("commonmark").enable("table")


@dataclass
class Html(HTMLParser):
    """What of a page a browser would follow (`links`), fetch by itself (`parts`), and jump to (`anchors`)."""

    links: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    sections: list[str] = field(default_factory=list)  # where the navigation leads

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if "id" in given:
            self.anchors.add(given["id"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
            if "md-nav__link" in given.get("class", ""):
                self.sections.append(given["href"])
        self.parts += [given[name] for name in ("src", "href", "data") if name in given and tag != "a"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Html]:
    """Built as `make docs` builds it; the files of it, the HTML pages read."""
    home = tmp_path_factory.mktemp("site")
    said = python("-m", "mkdocs", "build", "--strict", "-d", home, cwd=ROOT, NO_MKDOCS_2_WARNING="1")
    assert said.code == 0, said.out + said.err
    assert "WARNING" not in said.err, said.err
    pages = {}
    for path in home.rglob("*"):
        if path.suffix == ".html":
            pages[path] = Html()
            pages[path].feed(path.read_text(encoding="utf-8"))
    return pages


def test_every_page_of_docs_is_in_the_site_and_its_navigation(site: dict[Path, Html]) -> None:
    home = next(path for path in site if path.name == "404.html").parent
    named = {"README.md": "index.html", "CONTRIBUTING.md": "contributing.html", "CHANGELOG.md": "changelog.html"}
    wanted = {home / named[path.name] for path in TOP}
    for path in PAGES[len(TOP) :]:
        page = home / path.relative_to(ROOT / "docs").with_suffix(".html")
        wanted.add(page.with_name("index.html") if path.name == "README.md" else page)
    assert set(site) - {home / "404.html"} == wanted
    listed = {home / target for target in site[home / "index.html"].sections if not urlsplit(target).fragment}
    assert {Path(os.path.normpath(path)) for path in listed if path.suffix == ".html"} == wanted


def test_every_link_and_anchor_of_the_site_leads_somewhere(site: dict[Path, Html]) -> None:
    followed = 0
    for path, page in site.items():
        for target in [*page.links, *page.parts]:
            to = urlsplit(target)
            if to.scheme or to.netloc or path.name == "404.html":  # 404 is served at any place, and names no place
                continue
            file = Path(os.path.normpath(path.parent / unquote(to.path))) if to.path else path
            assert file.is_file(), f"{path.name}: {target}"
            if to.fragment and file in site:
                assert unquote(to.fragment) in site[file].anchors, f"{path.name}: {target}"
            followed += 1
    assert followed > 500


def test_the_site_fetches_nothing_from_the_network_and_can_be_searched_without_a_server(site: dict[Path, Html]) -> None:
    for path, page in site.items():
        assert [part for part in page.parts if urlsplit(part).netloc] == [], path.name
        home = path.parent if path.name == "404.html" else None
        index = home and (home / "search/search_index.js").read_text(encoding="utf-8")
        assert index is None or "Signs of trouble" in index


def test_no_line_of_a_list_or_a_table_is_left_in_a_paragraph(site: dict[Path, Html]) -> None:
    """Where Markdown readers differ: the site's wants an empty line before a list."""
    for path in site:
        for paragraph in re.findall(r"<p>(.*?)</p>", path.read_text(encoding="utf-8"), re.DOTALL):
            assert not re.search(r"^(\||[-*] |\d+\. )", paragraph, re.MULTILINE), f"{path.name}: {paragraph[:100]}"


def slug(heading: str) -> str:
    """A heading's anchor, where repositories are shown: lower case, blanks as hyphens, no punctuation."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def links_of(text: str) -> tuple[list[str], set[str]]:
    """(targets of links and pictures, anchors of headings) of a page."""
    targets, anchors = [], set()
    tokens = READER.parse(text)
    for before, token in zip([Token("", "", 0), *tokens], tokens, strict=False):
        for child in token.children or ():
            targets += [str(child.attrs[name]) for name in ("href", "src") if name in child.attrs]
        if before.type == "heading_open":
            said = slug("".join(child.content for child in token.children or ()))
            anchors.add(next(name for n in range(99) if (name := f"{said}-{n}" if n else said) not in anchors))
    return targets, anchors


def dead(path: Path) -> list[str]:
    """The links of a page, read where it lies, that lead nowhere; those to other places are not looked at."""
    found = []
    for target in links_of(path.read_text(encoding="utf-8"))[0]:
        to = urlsplit(target)
        if to.scheme or to.netloc:
            continue
        file = path.parent / unquote(to.path) if to.path else path
        there = file.exists() and file.resolve().is_relative_to(ROOT if path.is_relative_to(ROOT) else path.parent)
        if not there or (to.fragment and unquote(to.fragment) not in links_of(file.read_text(encoding="utf-8"))[1]):
            found.append(target)
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere_in_the_repository(path: Path) -> None:
    assert dead(path) == []


def test_a_dead_link_and_a_dead_anchor_are_found(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# The `one` thing: 4-bit\n\n## Twice\n\n## Twice\n")
    good = "[a](b.md) [b](b.md#the-one-thing-4-bit) [c](#here) [d](b.md#twice-1) [e](https://example.org/x)"
    bad = "[f](c.md) [g](b.md#other) ![h](h.png) [i](#there)"
    (tmp_path / "a.md").write_text(f"# Here\n\n{good}\n\n{bad}\n\n```\n[j](z.md)\n```\n")
    assert dead(tmp_path / "a.md") == ["c.md", "b.md#other", "h.png", "#there"]


def torn(text: str) -> list[str]:
    """Rows of tables with more or fewer cells than the first row, and rows that belong to no table."""
    lines, tables, other, found = text.splitlines(), [], set(), []
    for token in READER.parse(text):
        if token.type == "table_open" and token.map:
            tables.append(range(*token.map))
        elif token.type in ("fence", "code_block", "html_block") and token.map:
            other.update(range(*token.map))
    within = {number for table in tables for number in table}
    found += [line for n, line in enumerate(lines) if n not in within | other and line.lstrip().startswith("|")]
    for table in tables:
        wanted = cells(lines[table[0]])
        found += [lines[number] for number in table if cells(lines[number]) != wanted]
    return found


def cells(row: str) -> int:
    r"""A pipe ends a cell inside `code`, too; \| does not."""
    return len(re.findall(r"(?<!\\)\|", row.strip().strip("|"))) + 1


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_all_rows_of_a_table_have_the_same_number_of_cells(path: Path) -> None:
    assert torn(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("rows", "broken"),
    [
        ("| a | b |\n| --- | --- |\n| 1 | 2 |\n| | 2 |\n", []),
        ("| a | b |\n| --- | --- |\n| `x \\| y` | 2 |\n", []),
        ("| a | b |\n| --- | --- |\n| 1 | 2 |\n\n| 3 | 4 |\n", ["| 3 | 4 |"]),
        ("| a | b |\n| --- | --- |\n| 1 |\n", ["| 1 |"]),
        ("| a | b |\n| --- | --- |\n| 1 | 2 | 3 |\n", ["| 1 | 2 | 3 |"]),
        ("| a | b |\n| --- | --- |\n| `x | y` | 2 |\n", ["| `x | y` | 2 |"]),
        ("| a | b |\n| --- |\n| 1 | 2 |\n", ["| a | b |", "| --- |", "| 1 | 2 |"]),
        ("```\n| 3 | 4 |\n```\n", []),
    ],
)
def test_a_torn_table_is_found(rows: str, broken: list[str]) -> None:
    assert torn(f"Text.\n\n{rows}\nMore.\n") == broken


def test_formulas_become_mathml_and_prices_stay_as_they_are() -> None:
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs/site_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    text = "Let $a_1 < b^2$.\n\n$$\\sum_i x_i$$\n\nIt costs $5 or $6, see `$HOME`."
    reading = {"pymdownx.arithmatex": {"generic": True}}
    page = hooks.on_page_content(markdown.markdown(text, extensions=list(reading), extension_configs=reading))
    assert re.findall(r'<math [^>]*display="(\w+)"', page) == ["inline", "block"]
    assert "<msubsup>" in page or "<msub>" in page
    assert "arithmatex" not in page
    assert "It costs $5 or $6, see <code>$HOME</code>." in page
