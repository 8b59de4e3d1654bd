"""What README.md and docs/ say is what happens.

Every command of a page runs, in order, in one folder; every output it shows is compared; every row it shows is read.
In the pages' source, what follows the language of a fenced block says what the block is (readers do not see it):

    bash                 commands, run on a tiny random model for 2 steps
    console              `$ command` and what it prints, compared; … stands for lines left out
    console abridged     the same, run small, the output not compared (it took minutes, or has seconds in it)
    json my_rows.jsonl   a file that the reader has; so with text, yaml and python
    diff my_recipe.py    an edit of a file that the page has made
    json row             rows of data, then `text read-as` with what they become
    json refused         one row, then `text refusal` with the message
"""

import json
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetune_kit import recipe
from finetune_kit.cli import main, options
from finetune_kit.data.formats import FORMATS, recognise
from finetune_kit.data.load import load_data, load_records
from finetune_kit.data.records import LabelledCompletion, Message, Preference, Record, Text
from finetune_kit.errors import DataError
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.runs import save, saved
from finetune_kit.runs.verify import Proof
from finetune_kit.settings import schema

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    "README.md",
    "docs/data.md",
    "docs/tools.md",
    "docs/choose.md",
    "docs/add_a_method.md",
    "docs/pretrain.md",
    "docs/ppo.md",
    "docs/scale.md",
    "docs/reliability.md",
    "docs/security.md",
    "docs/safety.md",
]
SLOW = ("docs/choose.md", "docs/pretrain.md", "docs/safety.md", "docs/tools.md")  # in make test-long
NOT_RUN = ("git", "cd", "source", "pip")  # what a reader needs and the test already stands on
SMALL = (
    "max_steps=2",
    "evaluate.size=4",
    "evaluate.general_text=false",
    "evaluate.safety=null",
    "evaluate.bootstrap_samples=50",
)
ASKED = 40  # prompts of evaluate.safety
FEW = 8  # problems of a generated task
WIDTH = 100  # columns of the terminal that the pages show
Kit = Callable[[list[str]], tuple[int, str]]


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the hidden words after it, its text, and where it begins."""

    language: str
    words: str
    text: str
    where: str


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w+)[ ]?(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE)
    return [Block(m[1], m[2], m[3], f"{page}:{text[: m.start()].count(chr(10)) + 1}") for m in found]


def followed(page: str, first: str, then: str) -> Iterator[tuple[Block, Block]]:
    """Pairs of blocks with these words, one right after the other."""
    all_blocks = blocks(page)
    for block, following in zip(all_blocks, [*all_blocks[1:], None], strict=True):
        if block.words == first:
            assert following is not None, f"{block.where}: '{then}' is missing after it"
            assert following.words == then, f"{block.where}: '{then}' is missing after it"
            yield block, following


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to follow a page in: a terminal of 100 columns, a text of 60 lines, 24 rows a file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(options.out, "width", WIDTH)
    # the fresh process that loads what was saved takes most of a small run's time; runs/test_save.py has it
    for module in (save, saved):
        monkeypatch.setattr(module, "prove", lambda *_: Proof(0.0, 1e-4, "float32", "cpu"))
    lines = [f"Chapter {n}. The ship sailed on, and day {n} was as calm as the one before.\n" for n in range(60)]
    (tmp_path / "my_book.txt").write_text("".join(lines))
    for name in ("my_rows", "refusals", "pairs", "helpful_pairs", "harmless_pairs"):
        rows = [{"prompt": f"{name}: {n} + 1 =", "completion": f"{n + 1}"} for n in range(24)]
        pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "0"} for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, pairs if "pairs" in name else rows)))
    return tmp_path


@pytest.fixture
def kit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Kit:
    """(exit code, what it printed) of a command of ours, in this process."""

    def run(words: list[str]) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["finetune_kit", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main.main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out + captured.err

    return run


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.long) if page in SLOW else page for page in PAGES]
)
def test_every_command_of_a_page_runs_and_prints_what_the_page_shows(
    page: str, desk: Path, kit: Kit, tiny_model: Path
) -> None:
    for block in blocks(page):
        if block.language == "bash":
            for line in block.text.splitlines():
                follow(line, block.where, kit, tiny_model)
        elif block.language == "console":
            for command, shown in sessions(block.text):
                if block.words == "abridged":
                    follow(command, block.where, kit, tiny_model)
                else:
                    compare(command, shown, block.where, kit)
        elif block.language == "diff":
            edit(desk / block.words, block)
        elif "." in block.words:
            (desk / block.words).parent.mkdir(exist_ok=True)
            (desk / block.words).write_text(block.text, encoding="utf-8")


def follow(line: str, where: str, kit: Kit, tiny_model: Path) -> None:
    """Run one line of a bash block, training small, and see it end well."""
    words = shlex.split(line, comments=True)
    if words[:1] == ["make"]:
        words = made_by(words)
        if words[1:3] != ["-m", "finetune_kit"]:
            return
    if not words or words[0] in NOT_RUN:
        return
    assert words[1:3] == ["-m", "finetune_kit"], f"{where}: {line}: a command that this test cannot run"
    words = words[3:]
    few = [word for word in words if not word.startswith("evaluate.safety_size=")]
    words = few if few == words else [*few, f"evaluate.safety_size={ASKED}"]
    code, printed = kit(small(words, tiny_model) if words[0] in ("run", "check") else words)
    # two steps of a random model improve nothing
    assert code in ((0, 4) if "--require" in words else (0,)), f"{where}: {line}: exit {code}\n{printed}"


def compare(command: str, shown: str, where: str, kit: Kit) -> None:
    """Run a command as it stands, and see that it prints what is shown."""
    code, printed = kit(shlex.split(command)[3:])
    assert (code != 0) == shown.startswith("error:"), f"{where}: {command}: exit {code}\n{printed}"
    assert alike(shown, printed), f"{where}: {command}\nshown:\n{shown}\nprinted:\n{printed}"


def made_by(words: list[str]) -> list[str]:
    """The last command that a make target would run."""
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return shlex.split(done.stdout.splitlines()[-1])


def small(words: list[str], tiny_model: Path) -> list[str]:
    """The same command on the tiny model, two steps long; of a generated task, few problems."""
    given = dict(word.partition("=")[::2] for word in words)
    measured = {"evaluate.safety"} if "safe" in words else given.keys()
    if "evaluate.guards" in given:
        measured |= {"evaluate.safety", "evaluate.general_text"}
    short = [word for word in SMALL if word.partition("=")[0] not in measured]
    if words[1] == "pretrain":  # which makes its own model
        few = {"data.path": "my_book.txt", "data.max_length": "64", "depth": "1"}
        few |= {"eval_steps": "1", "sample_tokens": "4"} if words[0] == "run" else {}
        if not given.keys() & {"model.config", "tokenizer.vocab_size", "tokenizer.name_or_path"}:
            few["tokenizer.vocab_size"] = "300"
        kept = [word for word in words if not word.startswith(("depth=", "model.config="))]
        return [
            *kept,
            *(f"{name}={value}" for name, value in few.items() if name not in given or name == "depth"),
            *(short if words[0] == "run" else ()),
        ]
    path = "" if words[1].endswith(".yaml") else given.get("data.path", "reasoning_gym/")
    few = [f"data.size={FEW}"] if "reasoning_gym/" in path else []
    few += [f"data.held_out_size={FEW}"] if path.startswith("reasoning_gym/") else []
    kept = [word for word in words if not word.startswith("model.name_or_path=")]
    return [*kept, f"model.name_or_path={tiny_model}", *few, *(short if words[0] == "run" else ())]


def sessions(text: str) -> list[tuple[str, str]]:
    """(command, output) of each `$` of a console block."""
    parts = re.split(r"^\$ (.*)\n", text, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def alike(shown: str, printed: str) -> bool:
    """Equal, white space at the ends of lines aside; a line with … alone matches any lines."""
    tidy = ["\n".join(line.rstrip() for line in text.strip().splitlines()) + "\n" for text in (shown, printed)]
    pattern = "".join(r"(?:.*\n)*?" if line == "…" else re.escape(line) + "\n" for line in tidy[0].splitlines())
    return re.fullmatch(pattern, tidy[1]) is not None


def edit(path: Path, block: Block) -> None:
    """Do what a diff block says, hunk by hunk: lines with - give way to those with +, found by the text around them."""
    text = path.read_text(encoding="utf-8")
    for hunk in re.split(r"^@@.*\n", block.text, flags=re.MULTILINE):
        lines = hunk.splitlines()
        if not lines:
            continue
        old, new = ("".join(line[1:] + "\n" for line in lines if line[:1] != sign) for sign in "+-")
        assert text.count(old) == 1, f"{block.where}: found {text.count(old)} times in {path.name}:\n{old}"
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")


def told(record: Record) -> str:
    """A record as docs/data.md writes it: one line a turn."""
    if isinstance(record, Text):
        return f"text: {record.text}"
    if isinstance(record, Preference):
        sides = (("chosen", record.chosen), ("rejected", record.rejected))
        return turns(record.prompt) + "\n" + "\n".join(f"{name}: {turn['content']}" for name, (turn,) in sides)
    if isinstance(record, LabelledCompletion):
        return turns([*record.prompt, *record.completion]) + f"\nlabel: {str(record.label).lower()}"
    tools = [f"tools: {', '.join(tool['function']['name'] for tool in record.tools)}"] if record.tools else []
    return "\n".join([*tools, turns(record.messages)])


def turns(messages: list[Message]) -> str:
    lines = []
    for message in messages:
        said = repr(message["content"])[1:-1] if "\n" in message["content"] else message["content"]
        calls = [
            f"{call['function']['name']}({json.dumps(call['function']['arguments'])})" for call in calls_of(message)
        ]
        untrained = "" if message.get("train", True) else " (not trained)"
        lines.append(f"{message['role']}{untrained}: {said}{' '.join(calls)}")
    return "\n".join(lines)


def calls_of(message: Message) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = message.get("tool_calls", [])
    return calls


def test_every_row_of_the_data_page_is_read_as_the_page_says(tmp_path: Path) -> None:
    seen = set()
    for rows, become in followed("docs/data.md", "row", "read-as"):
        path = tmp_path / "rows.jsonl"
        path.write_text(rows.text)
        columns = set(json.loads(rows.text.splitlines()[0]))
        first = json.loads(rows.text.splitlines()[0])
        kind = next(item.kind for item in FORMATS if item.fits(columns, first))
        found = recognise(columns, first, kind, "the page")
        seen.add(found.name)
        records = load_records(str(path), schema.DataConfig(), kind)
        assert "\n".join(map(told, records)) == become.text.rstrip("\n"), rows.where
    assert seen == {item.name for item in FORMATS}, "every layout has a row on the page"


def test_every_refusal_of_the_data_page_has_the_message_that_the_page_shows(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = load_tokenizer(schema.ModelConfig(name_or_path=str(tiny_model)))
    good = json.dumps({"prompt": "1 + 1 =", "completion": "2"}) + "\n"
    shown = list(followed("docs/data.md", "refused", "refusal"))
    for row, refusal in shown:
        Path("rows.jsonl").write_text(row.text)
        Path("held.jsonl").write_text(good)
        settings = schema.DataConfig(path="rows.jsonl", held_out_path="held.jsonl")
        with pytest.raises(DataError) as error:
            load_data(settings, "prompt_completion", tokenizer)
        assert str(error.value) == refusal.text.rstrip("\n"), row.where
    assert len(shown) >= 6


def test_the_readme_lists_the_recipes_that_exist_and_no_others() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert tuple(rows) == recipe.BUILTIN


def test_settings_named_on_a_page_exist() -> None:
    classes = [recipe.load(name).config_class for name in recipe.BUILTIN]
    known = {leaf.key for config_class in classes for leaf in schema.leaves(config_class())}
    for page in PAGES:
        text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
        for named in re.findall(r"`((?:model|tokenizer|lora|data|train|evaluate)\.[a-z0-9_]+)", text):
            assert named in known or named.endswith((".safetensors", ".json")), f"{page}: {named}"


def test_links_between_the_pages_lead_somewhere() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_the_readme_is_short_and_complete_lines_fit_a_screen() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 170
