"""Pushing to the Hub, and fetching from it, against a real server on this machine (tests/fixtures_hub.py)."""

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from finetune_kit import recipe as recipes
from finetune_kit.data.load import load_records
from finetune_kit.errors import FinetuneKitError, ResourceError, SettingsError
from finetune_kit.models.load import load_base
from finetune_kit.models.provenance import base_license, base_record
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.rl.settings import PPOSettings, check_settings
from finetune_kit.run_folder import upload
from finetune_kit.runs import hub as kit
from finetune_kit.runs import save
from finetune_kit.runs.card import card_metadata
from finetune_kit.runs.save import Artifact
from finetune_kit.runs.saved import open_run
from finetune_kit.runs.verify import Proof
from finetune_kit.settings.load import resolve
from finetune_kit.settings.schema import DataConfig, ModelConfig, RecipeConfig
from finetune_kit.system.network import hub_reachable
from tests.fixtures_cli import ROOT, cli, python
from tests.fixtures_hub import TOKEN, Hub, environment
from tests.fixtures_hub import hub as hub
from tests.fixtures_training import FAST, ROWS

SMALL = ("evaluate.size=2", "evaluate.general_text=false", "evaluate.safety=null", "evaluate.bootstrap_samples=50")
SENT = {
    *("README.md", "adapter_config.json", "adapter_model.safetensors", "ancestry.json", "base.json"),
    *("chat_template.jinja", "generation_config.json", "report.html", "report.json", "run.yaml", "tokenizer.json"),
    "tokenizer_config.json",
}
STAYING = (
    "identity.json",
    "training_args.bin",
    "optimizer.pt",
    "trainer_state.json",
    "metrics.jsonl",
    "ledger.json",
    ".env",
)


@pytest.fixture
def run(lora_run: Artifact, tmp_path: Path) -> Path:
    """A copy of a finished run of an adapter, with the litter that other trainers leave."""
    folder = shutil.copytree(lora_run.folder, tmp_path / "runs" / "mine")
    for name in STAYING:
        (folder / name).write_text(f"secret of {tmp_path}")
    return folder


def state(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def metadata_of(hub: Hub, name: str) -> dict[str, Any]:
    """A pushed card's metadata, read by the Hub's own classes."""
    metadata: dict[str, Any] = ModelCard(hub.repos[name].files()["README.md"].decode()).data.to_dict()
    return metadata


# push


def test_a_push_sends_twelve_listed_files_to_a_private_repository_and_says_what_stays(hub: Hub, run: Path) -> None:
    said = cli("push", run, "ada/sums", "--yes")
    assert said.code == 0, said.err
    repo = hub.repos["ada/sums"]
    assert repo.private
    assert set(repo.files()) == {*SENT, ".gitattributes"}
    stays = next(line for line in said.out.splitlines() if line.startswith("Stays here:"))
    assert set(STAYING) | {"checkpoint-4/", "checkpoint-5/"} == set(stays.removeprefix("Stays here: ").split(", "))
    for name in SENT - {"README.md", "run.yaml"}:
        assert repo.files()[name] == (run / name).read_bytes(), name


def test_neither_the_token_nor_a_place_on_this_machine_is_in_anything_sent_kept_or_said(
    hub: Hub, run: Path, lora_run: Artifact
) -> None:
    said = cli("push", run, "ada/sums", "--yes")
    whole = hub.received()
    assert b'"lora_sft"' in whole  # base64 was undone
    for place in (run.parents[1], lora_run.folder.parent, ROOT):
        assert str(place).encode() not in whole
    for text in (whole, said.out.encode(), said.err.encode(), *(p.read_bytes() for p in run.rglob("*") if p.is_file())):
        assert TOKEN.encode() not in text
    settings = yaml.safe_load(hub.repos["ada/sums"].files()["run.yaml"])
    assert settings["model"]["name_or_path"] == "./tiny"
    assert (settings["data"]["path"], settings["train"]["output_dir"]) == ("./rows.jsonl", None)
    assert str(lora_run.folder.parent) in (run / "run.yaml").read_text()  # what was kept out


def test_a_pushed_card_has_the_report_s_numbers_after_training_with_intervals_in_their_names(
    hub: Hub, run: Path
) -> None:
    said = cli("push", run, "ada/sums", "--yes")
    assert "The card names no base_model: tiny is not a model of the Hub." in said.out
    card = ModelCard(hub.repos["ada/sums"].files()["README.md"].decode())
    metrics = json.loads((run / "report.json").read_text())["metrics"]
    assert hub.asked("POST /api/validate-yaml") >= 1  # huggingface_hub's own validator has seen it
    assert card.data.model_name == "sums"
    results = card.data.eval_results
    assert {it.metric_type: it.metric_value for it in results} == {
        it["name"]: pytest.approx(it["after"], abs=1e-6) for it in metrics
    }
    loss = next(it for it in metrics if it["name"] == "held_out_loss")
    named = next(it.metric_name for it in results if it.metric_type == "held_out_loss")
    assert f"95 % interval {loss['interval'][0]:+.4f} to {loss['interval'][1]:+.4f}, n = 3" in named
    assert "base_model" not in card.data.to_dict()
    assert card.text.strip() == (run / "README.md").read_text().split("---\n", 2)[2].strip()


def test_a_run_that_trained_all_weights_is_pushed_as_a_model(hub: Hub, full_run: Artifact) -> None:
    pushed = kit.prepare(full_run.folder, "ada/full", open_run(full_run.folder, []).config)
    upload.send(pushed)
    files = hub.repos["ada/full"].files()
    assert {"config.json", "model.safetensors", "run.yaml"} <= set(files)
    assert not {"adapter_config.json", "base.json"} & set(files)
    assert str(full_run.folder.parent).encode() not in hub.received()


def test_pushed_again_a_repository_is_updated_and_without_a_change_it_gets_no_commit(hub: Hub, run: Path) -> None:
    for _ in range(2):
        assert cli("push", run, "ada/sums", "--yes").code == 0
    repo = hub.repos["ada/sums"]
    assert repo.messages == ["", "Push mine"]
    (run / "chat_template.jinja").write_text("{{ messages }}")
    assert cli("push", run, "ada/sums", "--yes", "--message", "A plain template").code == 0
    assert repo.messages[2:] == ["A plain template"]
    assert repo.files()["chat_template.jinja"] == b"{{ messages }}"
    assert hub.asked("^PUT /lfs/") == 1  # the weights were there


def test_a_branch_is_made_and_main_stays_as_it_was(hub: Hub, run: Path) -> None:
    assert cli("push", run, "ada/sums", "--yes", "--revision", "second").code == 0
    repo = hub.repos["ada/sums"]
    assert (set(repo.files("main")), set(repo.files("second"))) == ({".gitattributes"}, {*SENT, ".gitattributes"})


def test_without_a_yes_nothing_is_sent_where_nobody_is_there_or_says_no(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", open("/dev/null"))  # noqa: SIM115, PTH123
    said = cli("push", run, "ada/sums")
    assert said.code == 2
    assert "adapter_model.safetensors" in said.out
    assert f"push {run} ada/sums --yes" in said.err
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    for answer in (False, True):
        assert hub.repos == {}
        monkeypatch.setattr("typer.confirm", lambda _, answer=answer: answer)
        said = cli("push", run, "ada/sums")
        assert (said.code, "Nothing was sent." in said.out) == (0, not answer)
    assert set(hub.repos["ada/sums"].files()) == {*SENT, ".gitattributes"}


def test_a_model_in_several_shards_arrives_whole_and_the_shards_of_an_earlier_push_go(
    hub: Hub, tiny_model: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    counts = []
    for size in ("60KB", "5GB"):
        folder = tmp_path / size
        model.save_pretrained(folder, max_shard_size=size)
        load_tokenizer(ModelConfig(name_or_path=str(tiny_model))).save_pretrained(folder)
        (folder / "README.md").write_text(card_metadata(RecipeConfig(), "transformers", ["merged"]) + "\n# merged\n")
        said = cli("push", folder, "ada/merged", "--yes", "--public")
        assert said.code == 0, said.err
        there = hub.repos["ada/merged"].files()
        assert {name: there[name] for name in state(folder) if name != "README.md"} == {
            path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"
        }
        counts.append(sum(name.endswith(".safetensors") for name in there))
    assert counts[0] > 2
    assert counts[1] == 1
    assert not hub.repos["ada/merged"].private
    load_base(ModelConfig(name_or_path="ada/merged"))


def test_settings_that_mean_places_on_this_machine_are_pushed_by_name_wherever_they_stand(
    hub: Hub, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "judge").mkdir()
    (tmp_path / "code.py").touch()
    words = [f"evaluate.reward_model={tmp_path / 'judge'}", f"data.options.file={tmp_path / 'code.py'}:score"]
    pushed = kit.prepare(run, "ada/sums", open_run(run, words).config)
    settings = pushed.files["run.yaml"]
    assert isinstance(settings, bytes)
    assert str(tmp_path).encode() not in settings
    assert yaml.safe_load(settings)["evaluate"]["reward_model"] == "./judge"
    assert yaml.safe_load(settings)["data"]["options"] == {"file": "code.py:score"}


@pytest.mark.parametrize("what", ["token", "path"])
def test_a_file_with_the_token_or_a_path_in_it_is_refused_by_name(hub: Hub, run: Path, what: str) -> None:
    secret = TOKEN if what == "token" else str(run)
    (run / "README.md").write_text((run / "README.md").read_text() + f"\nMade with {secret}.\n")
    said = cli("push", run, "ada/sums", "--yes")
    assert said.code == 6
    assert "README.md holds " + ("your token" if what == "token" else str(run)) in said.err
    assert TOKEN not in said.err + said.out
    assert hub.requests == []


def test_what_cannot_be_pushed_is_refused_before_anything_is_asked(hub: Hub, run: Path, tmp_path: Path) -> None:
    assert "expected user/name" in cli("push", run, "sums", "--yes").err
    assert "no weights" in cli("push", tmp_path, "ada/sums", "--yes").err
    (run / "README.md").write_text("---\ntags: [a\n---\n# x\n")
    assert cli("push", run, "ada/sums", "--yes").code == 2
    assert hub.requests == []


# faults

COMMIT, PUT = "^POST /api/models/ada/sums/commit", "^PUT /lfs/"


@pytest.mark.parametrize(
    ("where", "what", "times"),
    [
        (COMMIT, 500, 2),
        (COMMIT, 409, 1),
        (COMMIT, "cut", 1),
        (COMMIT, "slow", 1),
        (PUT, 500, 1),
        (PUT, "cut", 1),
        (PUT, "slow", 1),
        ("repos/create", 503, 1),
        ("preupload", 500, 1),
        ("lfs/objects/batch", 503, 1),
    ],
)
def test_a_fault_that_passes_is_waited_out(hub: Hub, run: Path, where: str, what: int | str, times: int) -> None:
    hub.fail(where, what, times)
    said = cli("push", run, "ada/sums", "--yes")
    assert said.code == 0, said.err
    assert hub.faults[0].times == 0  # it did happen
    assert set(hub.repos["ada/sums"].files()) == {*SENT, ".gitattributes"}
    assert hub.repos["ada/sums"].messages == ["", "Push mine"]


def test_a_repository_that_is_there_already_is_no_fault(hub: Hub, run: Path) -> None:
    hub.add("ada/sums", {".gitattributes": b"", "notes.txt": b"mine"}, private=True)
    assert cli("push", run, "ada/sums", "--yes").code == 0
    assert hub.repos["ada/sums"].files()["notes.txt"] == b"mine"


@pytest.mark.parametrize(("where", "what"), [(COMMIT, 500), (COMMIT, 403), (COMMIT, "cut"), (PUT, "cut"), (PUT, 500)])
def test_a_fault_that_stays_keeps_everything_and_gives_the_command_that_goes_on(
    hub: Hub, run: Path, where: str, what: int | str
) -> None:
    before = state(run)
    hub.fail(where, what, times=100)
    said = cli("push", run, "ada/sums", "--yes", "--revision", "second")
    assert said.code == 5, said.err
    assert TOKEN not in said.err + said.out  # the server repeats it
    assert state(run) == before
    command = said.err.split("python -m finetune_kit ")[1].split()
    assert command == ["push", str(run), "ada/sums", "--revision", "second", "--yes"]
    hub.faults.clear()
    stored = len(hub.objects)
    assert cli(*command).code == 0
    assert set(hub.repos["ada/sums"].files("second")) == {*SENT, ".gitattributes"}
    assert len(hub.objects) == 1
    assert stored == (0 if where == PUT else 1)


# token and rights


def refused(name: str = "ada/sums", private: bool = True) -> FinetuneKitError:
    with pytest.raises(FinetuneKitError) as caught:
        upload.check_access(name, private)
    assert TOKEN not in str(caught.value)
    return caught.value


def test_a_missing_and_an_unknown_token_have_different_next_steps(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.fail("whoami", 401)
    error = refused()
    assert error.message == "The Hub does not know this token."
    assert "hf auth login --force" in error.fix
    monkeypatch.delenv("HF_TOKEN")
    asked = len(hub.requests)
    assert refused().message == "There is no token of the Hub here, and ada/sums needs one that may write."
    assert len(hub.requests) == asked


def test_rights_are_read_from_the_token_and_the_groups_before_anything_is_sent(hub: Hub) -> None:
    upload.check_access("ada/sums")
    upload.check_access("lab/sums")
    assert "ada may not write to museum" in refused("museum/sums").message
    assert "ada may not write to babbage" in refused("babbage/sums").message
    token = hub.who["auth"]["accessToken"]
    token["role"] = "read"
    assert refused().message == "The token of ada may not write to ada/sums."
    token["role"] = "fineGrained"
    scope = {"entity": {"type": "user", "name": "ada"}, "permissions": ["repo.content.read"]}
    token["fineGrained"] = {"scoped": [scope]}
    assert refused().message == "The token of ada may not write to ada/sums."
    scope["permissions"] = ["repo.content.read", "repo.write"]
    upload.check_access("ada/sums")
    assert not hub.asked("^POST")


def test_a_public_repository_is_not_pushed_to_by_a_private_push(hub: Hub) -> None:
    hub.add("ada/sums", {})
    assert "is there already, and public" in refused().message
    upload.check_access("ada/sums", private=False)


def test_without_a_hub_it_is_said_at_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    hub_reachable.cache_clear()
    assert "The Hub cannot be reached" in refused().message


# hub.push


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hub.model_id=ada/x"], "hub.model_id (command line) has no effect without hub.push=true"),
        (["hub.private=false"], "hub.private (command line) has no effect without hub.push=true"),
        (["hub.strategy=every_save"], "hub.strategy (command line) has no effect without hub.push=true"),
        (["hub.push=true"], "does not say where to"),
        (["hub.push=true", "hub.model_id=x"], "expected user/name, found 'x'"),
        (
            ["hub.push=true", "hub.model_id=ada/x", "hub.strategy=every_save", "save_steps=null"],
            "without checkpoints on the way",
        ),
    ],
)
def test_a_hub_setting_that_cannot_act_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve(recipes.load("lora_sft").config_class, "lora_sft", None, words)
    assert said in caught.value.message


def test_checkpoints_of_ppo_hold_no_model_to_push() -> None:
    words = ["hub.push=true", "hub.model_id=ada/x", "hub.strategy=every_save", "save_steps=1"]
    config = resolve(recipes.load("ppo").config_class, "ppo", None, words)
    assert isinstance(config, PPOSettings)
    with pytest.raises(SettingsError, match="every_save has no effect in PPO"):
        check_settings(config, 1)


@pytest.fixture
def at_home(hub: Hub, home: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and a Hub with ada/tiny (a base with a card, gold in an older revision) and ada/rows."""
    folder = home / "desk"
    folder.mkdir()
    monkeypatch.chdir(folder)
    model = hub.add("ada/tiny", tiny_model)
    model.branches["gold"] = model.branches["main"]
    model.commit({**model.files(), "README.md": b"---\nlicense: mit\n---\n# tiny\n"})
    rows = hub.add("datasets/ada/rows", {"train.jsonl": "\n".join(map(json.dumps, ROWS)).encode()})
    rows.branches["old"] = rows.branches["main"]
    rows.commit({"train.jsonl": json.dumps({"prompt": "newest", "completion": "row"}).encode()})
    return folder


ASKED = (
    *("model.name_or_path=ada/tiny", "data.path=ada/rows", "data.revision=old", "output_dir=mine", *FAST),
    *("hub.push=true", "hub.model_id=ada/out"),
)


@pytest.mark.parametrize("status", [401, 403])
def test_a_run_that_is_to_be_pushed_asks_for_token_and_rights_before_it_begins(
    hub: Hub, at_home: Path, status: int
) -> None:
    hub.fail("whoami", status)
    said = cli("run", "lora_sft", *ASKED)
    assert said.code == 5
    assert not (at_home / "mine").exists()
    assert [path for _, path, _, _ in hub.requests] == ["/api/whoami-v2"]


@pytest.mark.long
def test_a_run_from_the_hub_is_pushed_with_its_checkpoints_fetched_and_measured_again_with_the_same_numbers(
    hub: Hub, at_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = cli("run", "lora_sft", *ASKED, "save_steps=1", "hub.strategy=every_save", "evaluate.size=2")
    assert said.code == 0, said.err
    assert "Pushed to" in said.out
    repo = hub.repos["ada/out"]
    assert repo.messages == ["", "Push checkpoint-1", "Push checkpoint-2", "Push mine"]
    steps = {
        f"checkpoint-{step}/{name}" for step in (1, 2) for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    assert set(repo.files()) == {*SENT, ".gitattributes", *steps}
    assert json.loads(repo.files()["checkpoint-1/adapter_config.json"])["base_model_name_or_path"] == "ada/tiny"
    metadata = metadata_of(hub, "ada/out")
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("ada/tiny", "adapter")
    assert (metadata["license"], metadata["datasets"]) == ("mit", ["ada/rows"])
    assert metadata["tags"] == ["finetune_kit", "lora_sft"]
    pushed = yaml.safe_load(repo.files()["run.yaml"])
    assert pushed["hub"] == {"model_id": None, "push": False, "private": True, "strategy": "end"}
    assert str(at_home).encode() not in hub.received()
    assert TOKEN.encode() not in hub.received()
    assert not [path for path in at_home.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]

    measured = json.loads((at_home / "mine" / "report.json").read_text())["metrics"]
    shutil.rmtree(at_home / "mine")
    again = cli("evaluate", "ada/out", "--revision", repo.branches["main"], "--json")
    assert again.code == 0, again.err
    for was, now in zip(measured, json.loads(again.out)["metrics"], strict=True):
        assert (was["name"], was["after"]) == (now["name"], pytest.approx(now["after"], abs=1e-4))
    assert not hub.asked(r"resolve/\w+/checkpoint-")
    assert cli("generate", "ada/out", "1 + 1 =", "--max-new-tokens", "3").code == 0
    assert cli("merge", "ada/out", "plain").code == 0
    said = cli("push", "plain", "ada/plain", "--yes")
    assert said.code == 0, said.err
    assert {"model.safetensors", "merge.json", "tokenizer.json"} <= set(hub.repos["ada/plain"].files())
    assert metadata_of(hub, "ada/plain")["base_model_relation"] == "finetune"
    assert str(at_home).encode() not in hub.received()

    hub_reachable.cache_clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert kit.fetch("ada/out").name == repo.branches["main"]  # from the cache


def test_a_checkpoint_that_cannot_be_pushed_does_not_end_the_run_and_an_end_that_cannot_keeps_it(
    hub: Hub, at_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save, "prove", lambda *_: Proof(0.0, 1e-4, "float32", "cpu"))  # the test above has it
    hub.fail("repos/create", 500, times=100)
    said = cli("run", "lora_sft", *ASKED, "save_steps=1", "hub.strategy=every_save")
    assert said.code == 5
    assert "push mine ada/out --yes" in said.err
    assert (at_home / "mine" / "report.json").is_file()
    hub.faults.clear()
    assert cli("push", "mine", "ada/out", "--yes").code == 0
    assert set(hub.repos["ada/out"].files()) >= SENT


def test_a_run_that_fails_its_requirement_is_not_pushed(
    hub: Hub, at_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save, "prove", lambda *_: Proof(0.0, 1e-4, "float32", "cpu"))
    said = cli("run", "lora_sft", *ASKED, "learning_rate=0", "--require", "improved")
    assert said.code == 4
    assert "ada/out" not in hub.repos


# pull


@pytest.mark.long
def test_the_base_and_the_rows_of_a_run_from_another_machine_are_named_by_two_settings(
    hub: Hub, run: Path, lora_run: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    desk = tmp_path / "desk"
    desk.mkdir()
    monkeypatch.chdir(desk)
    assert cli("push", run, "ada/sums", "--yes").code == 0
    rows = f"data.path={lora_run.folder.parent / 'rows.jsonl'}"
    said = cli("evaluate", "ada/sums", *SMALL, rows)
    assert said.code == 2
    assert "model.name_or_path=./tiny: no such folder." in said.err
    assert "model.name_or_path=FOLDER" in said.err
    said = cli("evaluate", "ada/sums", *SMALL, rows, f"model.name_or_path={lora_run.folder.parent / 'tiny'}")
    assert said.code == 0, said.err
    for words in (("generate", "ada/sums", "2 + 2 =", "--max-new-tokens=2"), ("merge", "ada/sums", desk / "merged")):
        shown = cli(*words)
        assert (shown.code, "for generate and merge --base FOLDER" in shown.err) == (2, True), shown.err
        shown = cli(*words, "--base", lora_run.folder.parent / "tiny")
        assert shown.code == 0, shown.err
    assert "what it was trained on (./rows.jsonl) is not here" in " ".join(said.err.split())


def test_a_fetched_run_cannot_name_code_to_run(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (run / "run.yaml").read_text()
    evil = b"raise SystemExit('ran')"
    for old, new, found in (
        ("recipe: lora_sft", "recipe: ./evil.py", "names the recipe ./evil.py, which would be run as code"),
        ("  hub_metrics: []", "  hub_metrics: [evil/metric]", "names metric scripts that would be fetched and run"),
    ):
        assert old in text
        (run / "run.yaml").write_text(text.replace(old, new))
        hub.repos.clear()
        hub.add("ada/evil", {**{p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}, "evil.py": evil})
        said = cli("evaluate", "ada/evil", *SMALL)
        assert said.code == 6, said.err
        assert found in said.err
        assert not hub.asked(r"resolve/\w+/(evil.py|training_args.bin|optimizer.pt)")


def test_what_cannot_be_fetched_is_told_apart(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("ada/there", run / "checkpoint-4")
    hub.add("ada/gated", run / "checkpoint-4", gated=True)
    hub.add("ada/own", run / "checkpoint-4", private=True)
    assert "ada/there has no revision v9" in cli("evaluate", "ada/there", "--revision", "v9").err
    assert "is not a run's folder: it has no run.yaml" in cli("evaluate", "ada/there").err
    said = cli("evaluate", "ada/gated")
    assert (said.code, "ada/gated is gated." in said.err, "hf auth login" in said.err) == (5, True, True)
    monkeypatch.delenv("HF_TOKEN")
    for name in ("ada/own", "ada/nothing"):
        said = cli("evaluate", name)
        assert (said.code, f"{name}: no such folder here" in said.err, "hf auth login" in said.err) == (5, True, True)
    assert "--revision has no effect" in cli("evaluate", run, "--revision", "main").err


# models and data from the Hub


def test_a_model_is_loaded_by_id_and_revision(hub: Hub, at_home: Path) -> None:
    for revision, license_ in (("gold", None), (None, "mit")):
        model = ModelConfig(name_or_path="ada/tiny", revision=revision)
        assert load_base(model).config.num_hidden_layers == 2
        assert load_tokenizer(model).eos_token
        assert base_record(model)["revision"] == hub.repos["ada/tiny"].branches[revision or "main"]
        assert base_license(model) == license_
    with pytest.raises(SettingsError, match="v9"):
        load_base(ModelConfig(name_or_path="ada/tiny", revision="v9"))


def test_a_gated_model_and_a_missing_token_have_their_next_step(
    hub: Hub, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("ada/gated", tiny_model, gated=True)
    hub.add("ada/own", tiny_model, private=True)
    with pytest.raises(ResourceError) as gated:
        load_tokenizer(ModelConfig(name_or_path="ada/gated"))
    assert gated.value.message == "ada/gated is gated."
    assert "https://huggingface.co/ada/gated" in gated.value.fix
    load_tokenizer(ModelConfig(name_or_path="ada/own"))
    monkeypatch.delenv("HF_TOKEN")
    hub.add("ada/other", tiny_model, private=True)
    with pytest.raises(FinetuneKitError) as private:
        load_tokenizer(ModelConfig(name_or_path="ada/other"))
    assert "hf auth login" in private.value.fix


def test_data_are_read_by_id_and_revision_and_refused_with_the_next_step(
    hub: Hub, at_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(load_records("ada/rows", DataConfig(revision="old"))) == len(ROWS)
    assert len(load_records("ada/rows", DataConfig())) == 1
    with pytest.raises(ResourceError, match="Revision 'v9' doesn't exist"):
        load_records("ada/rows", DataConfig(revision="v9"))
    hub.add("datasets/ada/gated", hub.repos["datasets/ada/rows"].files(), gated=True)
    with pytest.raises(ResourceError, match=r"gated(.|\n)*hf auth login"):
        load_records("ada/gated", DataConfig())
    monkeypatch.delenv("HF_TOKEN")
    hub.add("datasets/ada/own", hub.repos["datasets/ada/rows"].files(), private=True)
    with pytest.raises(ResourceError, match=r"ada/own(.|\n)*hf auth login"):
        load_records("ada/own", DataConfig())


OFFLINE = """
from finetune_kit.settings.schema import DataConfig, ModelConfig
from finetune_kit.data.load import load_records
from finetune_kit.models.load import load_base
print(type(load_base(ModelConfig(name_or_path="ada/tiny"))).__name__, len(load_records("ada/rows", DataConfig())))
"""


@pytest.mark.long
def test_offline_what_is_in_the_cache_is_used_and_nothing_is_asked(hub: Hub, at_home: Path, tmp_path: Path) -> None:
    base, rows = load_base(ModelConfig(name_or_path="ada/tiny")), load_records("ada/rows", DataConfig())
    asked = len(hub.requests)
    variables = environment(hub, tmp_path / "hf", HF_TOKEN=TOKEN, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1")
    said = python("-c", OFFLINE, cwd=at_home, **variables)
    assert said.code == 0, said.err
    assert said.out.split() == [type(base).__name__, str(len(rows))]
    assert len(hub.requests) == asked > 0
