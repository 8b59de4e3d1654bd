"""No secret is written, no connection is opened, no old library is used: whole runs, looked at from outside."""

import json
import os
from importlib import metadata
from pathlib import Path

import pytest

from finetune_kit.errors import SecurityError, SettingsError
from finetune_kit.models.provenance import check_base
from finetune_kit.runs import hub
from finetune_kit.runs.diff import difference
from finetune_kit.runs.saved import open_run
from finetune_kit.settings.schema import ModelConfig
from finetune_kit.system.versions import FLOORS
from tests.fixtures_cli import ROOT, cli, python
from tests.fixtures_training import FAST, write_rows

TOKEN = "hf_CANARY" + "Ab1" * 10

# a run in a process in which whoever opens a connection, or asks for an address, is written down and refused
BLOCKED = """
import socket, sys
asked = []
def refuse(self, address, *rest):
    if getattr(self, "family", None) != socket.AF_UNIX:
        asked.append(repr(address))
    raise OSError("blocked")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = lambda *address, **named: refuse(None, address)
from finetune_kit.cli.main import main
sys.argv = ["finetune_kit", *sys.argv[1:]]
try:
    main()
except SystemExit as stop:
    code = stop.code
print("ASKED", *asked, sep="\\n")
sys.exit(code)
"""


def test_a_local_run_opens_no_connection_and_leaves_the_token_nowhere(home: Path) -> None:
    pairs = [{"prompt": f"{n} + {n} =", "chosen": str(2 * n), "rejected": "no"} for n in range(40)]
    write_rows(home / "pairs.jsonl", pairs)
    words = ("model.name_or_path=tiny", "data.path=pairs.jsonl", "output_dir=run", "save_steps=1", "eval_steps=1")
    said = python(
        *("-c", BLOCKED, "run", "dpo", *words, *FAST),
        cwd=home,
        PYTHONPATH=str(ROOT),
        HF_HOME=str(home / "hf"),
        HF_TOKEN=TOKEN,
        HUGGING_FACE_HUB_TOKEN=TOKEN,
        WANDB_API_KEY=TOKEN,
    )
    assert said.code == 0, said.err
    assert said.out.rstrip().endswith("ASKED"), said.out
    written = [path for path in (home / "run").rglob("*") if path.is_file()]
    assert {"run.yaml", "report.html", "README.md", "metrics.jsonl", "ledger.json"} <= {path.name for path in written}
    assert any(path.parent.name.startswith("checkpoint-") for path in written)
    assert [path for path in written if TOKEN.encode() in path.read_bytes()] == []
    assert TOKEN not in said.out + said.err
    assert [path for path in written if path.suffix in (".bin", ".pkl", ".pickle")] == []


@pytest.mark.parametrize("library", FLOORS)
def test_a_version_below_its_floor_is_refused_at_the_start_with_the_cve(
    library: str, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.chdir(home)
    floor, reason = FLOORS[library]
    older = ".".join(map(str, (*floor[:-1], floor[-1] - 1)))
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: older if name == library else real(name))
    for words in (("run", "lora_sft"), ("check", "lora_sft"), ("evaluate", "run"), ("generate", "run", "a")):
        said = cli(*words)
        assert said.code == 6
        assert f"error: {library} {older} is not safe to use: below {'.'.join(map(str, floor))} {reason}." in said.err
    assert "CVE-20" in reason


def test_a_release_of_the_floor_itself_is_taken(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.chdir(home)
    written = {library: ".".join(map(str, floor)) + "+local.1" for library, (floor, _) in FLOORS.items()}
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: written.get(name) or real(name))
    said = cli("check", "lora_sft", "--json", "model.name_or_path=tiny", "data.path=rows.jsonl")
    assert said.code == 0, said.err
    assert json.loads(said.out)["rows"] > 0


@pytest.mark.parametrize(
    "name", ["README.md", "report.html", "run.yaml", "ledger.json", "metrics.jsonl", "identity.json"]
)
@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_a_link_out_of_a_run_s_folder_is_not_sent_read_or_written_by_any_command(
    name: str, kind: str, tmp_path: Path
) -> None:
    folder, secret = tmp_path / "theirs", tmp_path / "secret.txt"
    folder.mkdir()
    secret.write_text("a key")
    for file in ("adapter_model.safetensors", "adapter_config.json", "run.yaml", "report.json"):
        (folder / file).write_text("{}")
    (folder / name).unlink(missing_ok=True)
    if kind == "link":
        (folder / name).symlink_to(secret)
    else:
        os.mkfifo(folder / name)
    said = f"{name} is a link to .*outside the" if kind == "link" else f"{name} is not a plain file"
    for act in (
        lambda: hub.prepare(folder, "ada/theirs", None),
        lambda: open_run(folder, []),
        lambda: difference(folder, folder),
    ):
        with pytest.raises(SecurityError, match=said):
            act()


def test_a_stranger_s_report_without_metrics_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("recipe: kto\n")
    (tmp_path / "report.json").write_text('{"metrics": [1], "verdict": 3}')
    with pytest.raises(SettingsError, match=r"report\.json is not a run's report"):
        difference(tmp_path, tmp_path)
    (tmp_path / "report.json").write_text('{"metrics": [{"name": "a", "before": "x", "after": 1}]}')
    with pytest.raises(SettingsError, match=r"report\.json is not a run's report"):
        difference(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("ledger.json", '{"train": 3}', "train is not an object"),
        ("ledger.json", '{"held_out": {"dropped": [1]}}', "held_out.dropped is not an object"),
        ("ledger.json", "[1]", "expected a JSON object"),
        ("run.yaml", "recipe: kto\nversions: 3\n", "versions is not an object"),
        ("run.yaml", "recipe: kto\norigins: [1]\n", "origins is not an object"),
    ],
)
def test_a_stranger_s_record_of_another_shape_is_a_message(name: str, content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("recipe: kto\n")
    (tmp_path / name).write_text(content)
    with pytest.raises(SettingsError, match=rf"{name}.*{said}"):
        difference(tmp_path, tmp_path)


@pytest.mark.parametrize(
    "record",
    [
        "{}",
        "[]",
        '{"name": "a", "revision": null, "weights": null, "config": {"model_type": "evil"}}',
        '{"name": "a", "revision": null, "weights": null, "config": [1]}',
        '{"name": "a", "revision": null, "weights": null, "config": {"model_type": "llama", "hidden_size": "x"}}',
        '{"config": {"model_type": "llama"}}',
    ],
)
def test_a_stranger_s_record_of_the_base_is_a_message_whatever_is_in_it(record: str, home: Path) -> None:
    (home / "base.json").write_text(record)
    with pytest.raises(SettingsError, match=r"base\.json"):
        check_base(ModelConfig(name_or_path=str(home / "tiny")), home)
