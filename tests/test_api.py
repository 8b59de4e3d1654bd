"""The public API: docs/api.md runs as it stands, on the tiny model."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import finetune_kit as ft
from finetune_kit import api
from finetune_kit.runs import answering, save, saved
from finetune_kit.runs.verify import Proof
from finetune_kit.settings.schema import KEYWORD, ModelConfig
from tests.fixtures_cli import ROOT, python

PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


@pytest.fixture(scope="module")
def namespace(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the page's blocks leave behind, run one after the other with the tiny model as the default."""
    home = tmp_path_factory.mktemp("api")
    rows = [{"question": f"What is {n} + {n}?", "answer": str(n + n)} for n in range(60)]
    (home / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": f"{n}?", "chosen": f"{n} it is", "rejected": "no"} for n in range(60)]
    (home / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(ModelConfig.__dataclass_fields__["name_or_path"], "default", str(tiny_model))
        patch.setattr(ModelConfig.__init__, "__defaults__", (str(tiny_model), *ModelConfig.__init__.__defaults__[1:]))
        for module in (save, saved):  # tests/runs/test_save.py has the fresh process that loads what was saved
            patch.setattr(module, "prove", lambda *_: Proof(0.0, 1e-4, "float32", "cpu"))
        for block in BLOCKS:
            exec(compile(block, "docs/api.md", "exec"), found)
        yield found


def test_every_block_of_the_page_runs_and_leaves_two_runs(namespace: dict[str, Any]) -> None:
    assert Path("runs/mine/report.json").is_file()
    assert Path("runs/pairs/report.json").is_file()
    assert namespace["artifact"].folder == Path("runs/focal")


def test_a_run_is_read_back_with_its_metrics_samples_and_history(namespace: dict[str, Any]) -> None:
    run = namespace["run"]
    assert {"name", "before", "after", "difference", "interval", "n", "verdict"} <= run.metrics[0].keys()
    assert run.history[0]["step"] == 1
    assert run.settings.origins["data.path"].endswith("run.yaml:" + run.settings.origins["data.path"].split(":")[-1])
    page = run._repr_html_()
    assert page.startswith("<iframe")
    assert page == run.report._repr_html_()


def test_one_prompt_gives_a_text_a_list_gives_a_list_and_a_conversation_is_one_prompt(
    namespace: dict[str, Any],
) -> None:
    run = namespace["run"]
    one = run.generate("1 + 1?", max_new_tokens=4)
    assert isinstance(one, str)
    assert run.generate([{"role": "user", "content": "1 + 1?"}], max_new_tokens=4) == one
    assert run.generate(["1 + 1?", "2 + 2?"], max_new_tokens=4)[0] == one
    assert run.generate(["1 + 1?", "2 + 2?"], max_new_tokens=4, batch_size=1)[0] == one
    assert run.generate([], max_new_tokens=4) == []
    with pytest.raises(ft.FinetuneKitError, match="no setting temperatur"):
        run.generate("1?", temperatur=1)
    with pytest.raises(ft.FinetuneKitError, match="batch_size=0; expected 1 or more"):
        run.generate("1?", batch_size=0)


@pytest.mark.parametrize(("stop", "meant"), [("END", ("END",)), (["a", "b"], ("a", "b")), (None, ())])
def test_a_text_to_stop_at_is_one_text_and_not_its_letters(
    namespace: dict[str, Any], monkeypatch: pytest.MonkeyPatch, stop: Any, meant: tuple[str, ...]
) -> None:
    seen, prepare = [], answering.prepare
    monkeypatch.setattr(answering, "prepare", lambda run, how, system: seen.append(how) or prepare(run, how, system))
    namespace["run"].generate("1?", max_new_tokens=1, stop=stop)
    assert seen[0].stop == meant


def test_a_run_that_is_to_be_pushed_is_pushed_with_its_settings(
    namespace: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    finished, sent = namespace["run"], []
    monkeypatch.setattr("finetune_kit.runs.train.train", lambda recipe, settings: finished)
    monkeypatch.setattr("finetune_kit.runs.hub.push_run", lambda folder, settings: sent.append(settings.hub.model_id))
    ft.run("lora_sft", data={"path": "mine.jsonl"}, output_dir="runs/kept")
    assert sent == []
    ft.run("lora_sft", data={"path": "mine.jsonl"}, output_dir="runs/sent", hub={"push": True, "model_id": "ada/sums"})
    assert sent == ["ada/sums"]


def test_a_loss_of_one_s_own_is_what_is_trained(namespace: dict[str, Any]) -> None:
    lines = [json.loads(line) for line in Path("runs/focal/metrics.jsonl").read_text().splitlines()]
    plain = [json.loads(line) for line in Path("runs/mine/metrics.jsonl").read_text().splitlines()]
    # (1 - p)^2 of a random model's p, about 1/260, is close to 1 and below it
    assert 0.9 < lines[0]["loss"] / plain[0]["loss"] < 1.0


def test_a_trainer_without_such_a_loss_says_so(namespace: dict[str, Any]) -> None:
    from trl import DPOConfig, DPOTrainer

    settings = ft.load_settings("dpo", data={"path": "pairs.jsonl"}, output_dir="runs/none")
    with pytest.raises(ft.FinetuneKitError, match="DPOTrainer takes no compute_loss_func"):
        ft.build(
            DPOTrainer,
            DPOConfig,
            settings,
            namespace["policy"],
            namespace["tokenizer"],
            namespace["data"],
            compute_loss_func=namespace["focal"],
        )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"learning_rate": 1e-4}, ["learning_rate=0.0001"]),
        (
            {"data": {"path": ["a", "b"], "columns": {"q": "question"}}},
            ['data.path=["a", "b"]', 'data.columns={"q": "question"}'],
        ),
        ({"save_steps": None, "padding_free": False}, ["save_steps=null", "padding_free=false"]),
        ({"output_dir": Path("runs/x")}, ['output_dir="runs/x"']),
    ],
)
def test_keywords_become_the_words_of_the_command_line(given: dict[str, Any], words: list[str]) -> None:
    from finetune_kit.settings.schema import RecipeConfig

    assert api._words(RecipeConfig, given) == words


def test_a_keyword_is_the_user_s_own_word_and_a_mistake_in_it_is_told_as_that() -> None:
    with pytest.raises(ft.FinetuneKitError, match=rf"learning_rat: unknown setting \({KEYWORD}\)"):
        ft.run("lora_sft", learning_rat=1)
    with pytest.raises(ft.FinetuneKitError, match="learning_rate: a list_iterator is not a setting"):
        ft.run("lora_sft", learning_rate=iter([1]))


def test_importing_the_package_loads_neither_torch_nor_transformers_and_each_name_is_there(tmp_path: Path) -> None:
    heavy = "{'torch', 'transformers', 'numpy'}"
    said = python("-c", f"import sys, finetune_kit; print(sorted({heavy} & set(sys.modules)))", cwd=tmp_path)
    assert said.out.strip() == "[]", said.err
    assert all(getattr(ft, name) is not None for name in ft.__all__)
    assert {name for names in ft._HOME.values() for name in names} == set(ft.__all__)
    with pytest.raises(AttributeError, match="no attribute 'train_everything'"):
        ft.train_everything  # noqa: B018
    assert (Path(sys.modules["finetune_kit"].__file__ or "").parent / "py.typed").is_file()
