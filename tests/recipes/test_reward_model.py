"""reward_model: Bradley-Terry on pairs, from the first row to the proven artifact and its gate."""

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune_kit import recipe as recipes
from finetune_kit.data.chat import end_token_ids, render_prompt
from finetune_kit.data.load import load_data
from finetune_kit.data.records import Prompt
from finetune_kit.data.token_ids import ids_of
from finetune_kit.errors import DataError, NumericsError, SettingsError
from finetune_kit.evaluation.reward_gate import measure_rewards
from finetune_kit.models.adapter_config import NAME
from finetune_kit.models.load import load_policy
from finetune_kit.models.reward import load_saved, score_rows
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.planning.plan import plan
from finetune_kit.rewards.models import check_judge, shares_base
from finetune_kit.rewards.settings import RewardConfig
from finetune_kit.rewards.sources import load_rewards
from finetune_kit.run_folder import upload
from finetune_kit.runs import hub as kit_hub
from finetune_kit.runs.answering import Decoding
from finetune_kit.runs.answering import prepare as prepare_answering
from finetune_kit.runs.merge import merge, table_of, verdict_of
from finetune_kit.runs.merge_rewards import merged
from finetune_kit.runs.save import Artifact
from finetune_kit.runs.saved import compare_adapters, compare_run, open_run, verify_run
from finetune_kit.runs.verify import prove
from finetune_kit.settings.schema import LoraConfig, ModelConfig
from tests import fixtures_training
from tests.conftest import furnish
from tests.fixtures_hub import Hub
from tests.fixtures_hub import hub as hub
from tests.fixtures_training import settings, train, write_rows
from tests.models.small import write_model

WORDS = ("red", "blue", "green", "tall", "old", "small")


def pairs(count: int, **columns: Any) -> list[dict[str, Any]]:
    """The chosen answer has the word good somewhere, the rejected one another word in its place."""
    draw = random.Random(0)
    rows = []
    for number in range(count):
        words = draw.choices(WORDS, k=draw.randint(1, 3))
        at = draw.randint(0, len(words))
        sides = {
            side: " ".join([*words[:at], word, *words[at:]])
            for side, word in (("chosen", "good"), ("rejected", draw.choice(WORDS)))
        }
        rows.append({"prompt": f"say {number}", **sides, **columns})
    return rows


@pytest.fixture
def paired(home: Path) -> Path:
    """A folder with the tiny model and 40 pairs in rows.jsonl."""
    write_rows(home / "rows.jsonl", pairs(40))
    return home


@pytest.mark.parametrize("words", [[], ["lora.r=0"]])
def test_check_counts_the_head_that_is_trained_and_no_other(paired: Path, words: list[str]) -> None:
    config = settings("reward_model", paired, *words)
    model = fixtures_training.prepare("reward_model", paired, *words).model
    found = plan(config, load_data(config.data, config.kind, load_tokenizer(config.model)))
    assert found["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert found["trainable_parameters"] == sum(w.numel() for w in model.parameters() if w.requires_grad)


@pytest.fixture(scope="module")
def good_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Artifact:
    """A whole run, 80 steps of 8 pairs, the held-out loss after 40 and 80. Read only."""
    home = furnish(tmp_path_factory.mktemp("good"), tiny_model)
    write_rows(home / "rows.jsonl", pairs(400))
    words = ("max_steps=80", "learning_rate=5e-3", "per_device_train_batch_size=8", "held_out_size=64", "eval_steps=40")
    return train("reward_model", home, *words)


def loss_of(trainer: Any, scores: list[float], **inputs: torch.Tensor) -> float:
    """The trainer's loss of a batch whose first half is chosen, with scores chosen by hand."""
    logits = torch.tensor(scores)[:, None]
    batch = {"attention_mask": torch.ones(len(scores), 1, dtype=torch.long), **inputs}
    return float(trainer.compute_loss(lambda **_: SimpleNamespace(logits=logits), batch))


def test_the_tiny_model_learns_to_prefer_the_word_good_on_over_90_percent_of_held_out_pairs(good_run: Artifact) -> None:
    accuracy = next(entry for entry in good_run.report.metrics if entry["name"] == "preference_accuracy")
    assert accuracy["after"] > 0.9
    assert accuracy["verdict"] == "better"
    gate = json.loads((good_run.folder / "report.json").read_text())["gate"]
    assert gate["passed"]
    assert gate["length_rule_accuracy"] < 0.8
    assert gate["interval"][0] > 0.8


def test_the_first_loss_is_within_0_05_of_ln_2_and_held_out_losses_are_recorded(good_run: Artifact) -> None:
    lines = [json.loads(line) for line in (good_run.folder / "metrics.jsonl").read_text().splitlines()]
    assert next(line["loss"] for line in lines if "loss" in line) == pytest.approx(math.log(2), abs=0.05)
    watched = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in watched] == [40, 80]
    after = next(entry["after"] for entry in good_run.report.metrics if entry["name"] == "pair_loss")
    assert after == pytest.approx(min(line["eval_loss"] for line in watched), abs=1e-6)


def test_the_folder_holds_the_adapter_with_its_head_and_a_fresh_process_gave_the_same_score(good_run: Artifact) -> None:
    from safetensors.torch import load_file

    report = json.loads((good_run.folder / "report.json").read_text())
    assert report["reload_max_logit_difference"] <= 1e-4
    saved = load_file(good_run.folder / "adapter_model.safetensors")
    assert [tuple(weight.shape) for name, weight in saved.items() if "score" in name] == [(1, 64)]
    assert json.loads((good_run.folder / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    assert not (good_run.folder / "generation_config.json").exists()
    card = (good_run.folder / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "enough for PPO" in card
    assert "How sure, and how often right" in (good_run.folder / "report.html").read_text()


def test_the_reload_test_notices_a_head_that_is_not_the_saved_one(good_run: Artifact) -> None:
    run = open_run(good_run.folder, [])
    tokenizer = load_tokenizer(run.config.model, saved=run.folder)
    model = load_saved(run.config.model, run.folder, tokenizer, [tokenizer.eos_token_id])
    model.get_base_model().score.modules_to_save["default"].weight.data.add_(0.01)
    with pytest.raises(NumericsError, match="its outputs differ by"):
        prove(model, run.config.model, run.folder, [40, 41, 42, 3])


def test_evaluate_measures_the_same_numbers_again(good_run: Artifact) -> None:
    again = compare_run(open_run(good_run.folder, []))
    for then, now in zip(good_run.report.metrics, again.metrics, strict=True):
        assert (now["before"], now["after"]) == pytest.approx((then["before"], then["after"]), abs=1e-5)
    assert again.details["gate"] == good_run.report.details["gate"]


def test_it_judges_the_answers_of_another_run_before_and_after(good_run: Artifact, home: Path) -> None:
    write_rows(home / "rows.jsonl", pairs(40))
    words = ("learning_rate=5e-3", "max_steps=4", "evaluate.size=5", "held_out_size=6")
    run = train("dpo", home, f"evaluate.reward_model={good_run.folder}", *words)
    judged = next(entry for entry in run.report.metrics if entry["name"] == "reward")
    assert (judged["n"], judged["higher_is_better"]) == (5, True)
    assert run.report.wins + run.report.ties + run.report.losses == 5
    model = load_saved(ModelConfig(str(home / "tiny")), good_run.folder, *_reading(good_run))
    rows = [_whole(good_run, sample["prompt"], sample["after"]) for sample in run.report.samples]
    assert score_rows(model, rows, 5) == pytest.approx([sample["scores"]["reward"][1] for sample in run.report.samples])
    with pytest.raises(SettingsError, match=r"has no effect: evaluate\.size is 0"):
        fixtures_training.prepare("dpo", home, f"evaluate.reward_model={good_run.folder}")


def _reading(run: Artifact) -> tuple[Any, list[int]]:
    """A run's tokenizer, and what ends an answer."""
    tokenizer = load_tokenizer(ModelConfig(), saved=run.folder)
    return tokenizer, end_token_ids(tokenizer)


def _whole(run: Artifact, prompt: str, answer: str) -> list[int]:
    """Prompt, answer and end token as the reward model of a run reads them."""
    tokenizer, ends = _reading(run)
    prompt_ids = render_prompt(tokenizer, [{"role": "user", "content": prompt}])
    return [*prompt_ids, *ids_of(tokenizer, answer), ends[0]]


def test_it_is_no_start_for_a_policy(good_run: Artifact, paired: Path) -> None:
    with pytest.raises(SettingsError, match="is a classifier, such as a reward model: it scores texts and writes none"):
        fixtures_training.prepare("dpo", paired, f"model.name_or_path={good_run.folder}")


def test_generate_and_adapters_beside_it_are_refused_with_what_to_do(good_run: Artifact) -> None:
    run = open_run(good_run.folder, [])
    for refused in (
        lambda: prepare_answering(run, Decoding()),
        lambda: compare_adapters(run, [good_run.folder]),
    ):
        with pytest.raises(SettingsError, match=r"scores answers and writes none(.|\n)*finetune_kit evaluate"):
            refused()


def test_a_full_run_saves_a_whole_model_that_scores_the_same_and_is_measured_again(paired: Path) -> None:
    run = train("reward_model", paired, "lora.r=0", "learning_rate=1e-3", "max_steps=4")
    assert json.loads((run.folder / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]
    assert json.loads((run.folder / "report.json").read_text())["reload_max_logit_difference"] <= 1e-4
    again = compare_run(open_run(run.folder, []))
    assert [entry["after"] for entry in again.metrics] == pytest.approx(
        [entry["after"] for entry in run.report.metrics], abs=1e-5
    )
    with pytest.raises(SettingsError, match="writes none"):
        prepare_answering(open_run(run.folder, []), Decoding())


def test_a_whole_run_on_a_4_bit_base_reloads_within_1e_4(paired: Path) -> None:
    run = train("reward_model", paired, "load_in_4bit=true", "learning_rate=1e-2")
    assert json.loads((run.folder / "report.json").read_text())["reload_max_logit_difference"] <= 1e-4
    # what the 4 bits stand for is nearer to what was trained than the base before them
    tokenizer, ends = _reading(run)
    plain, found = merged(open_run(run.folder, []), tokenizer, ("base", "dequantised"), 2)
    assert found["candidate"] == "dequantised"
    differences = {name: numbers["score_difference"] for name, numbers in found["candidates"].items()}
    assert differences["dequantised"] < 1e-5 < differences["base"]
    assert (found["scores_measured_on"]["rows"], found["candidates"]["base"]["same_preference"]) == (4, 1.0)
    quantised = load_saved(open_run(run.folder, []).config.model, run.folder, tokenizer, ends)
    row = _whole(run, "say 1", "good")
    assert score_rows(plain, [row]) == pytest.approx(score_rows(quantised, [row]), abs=1e-5)


def test_the_loss_is_the_formula_on_scores_chosen_by_hand(paired: Path) -> None:
    scores = [1.0, -0.5, 0.25, 0.5]  # two chosen, two rejected: differences 0.75 and -1
    plain = -sum(math.log(1 / (1 + math.exp(-difference))) for difference in (0.75, -1.0)) / 2
    off = fixtures_training.prepare("reward_model", paired, "center_rewards_coefficient=0").trainer
    assert loss_of(off, scores) == pytest.approx(plain)
    assert loss_of(off, [0.0] * 4) == pytest.approx(math.log(2))
    centred = fixtures_training.prepare("reward_model", paired, "center_rewards_coefficient=0.1").trainer
    assert loss_of(centred, scores) == pytest.approx(plain + 0.1 * (1.25**2 + 0.0**2) / 2)
    margins = torch.tensor([0.5, 2.0])
    asked = -sum(math.log(1 / (1 + math.exp(-difference))) for difference in (0.25, -3.0)) / 2
    assert loss_of(off, scores, margin=margins) == pytest.approx(asked)


def test_rows_are_prompt_and_answer_to_the_end_token_and_padding_free_gives_the_padded_loss(paired: Path) -> None:
    losses = []
    for word in ("padding_free=true", "padding_free=false"):
        parts = fixtures_training.prepare("reward_model", paired, word)
        trainer, first = parts.trainer, parts.data.train[0]
        assert trainer.train_dataset[0]["rejected_ids"] == first["prompt_ids"] + first["rejected_ids"]
        assert first["chosen_ids"][-1] == parts.tokenizer.eos_token_id
        batch = next(iter(trainer.get_train_dataloader()))
        assert "margin" not in batch
        losses.append(float(trainer.compute_loss(parts.model, dict(batch))))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_a_large_center_rewards_coefficient_keeps_the_mean_score_of_a_pair_nearer_to_0(paired: Path) -> None:
    means = []
    for coefficient in (0, 10):
        parts = fixtures_training.prepare(
            "reward_model", paired, f"center_rewards_coefficient={coefficient}", "max_steps=10", "learning_rate=5e-3"
        )
        with torch.no_grad():  # as a head would be that gives every answer a high score
            parts.model.get_base_model().score.modules_to_save["default"].weight.add_(0.05)
        parts.trainer.train()
        scores = measure_rewards(parts.model, parts.tokenizer, parts.data, parts.config.evaluate)
        means.append(abs(sum(scores.chosen + scores.rejected)) / len(scores.chosen))
    assert means[1] < 0.2 * means[0]


def test_margins_reach_the_batch_and_ask_for_a_larger_difference(home: Path) -> None:
    write_rows(home / "rows.jsonl", pairs(40, margin=3.0))
    with_margins, without = (
        fixtures_training.prepare("reward_model", home, "margins=true"),
        fixtures_training.prepare("reward_model", home, "margins=false"),
    )
    batch = next(iter(with_margins.trainer.get_train_dataloader()))
    assert batch["margin"].tolist() == [3.0] * 4
    start = float(with_margins.trainer.compute_loss(with_margins.model, dict(batch)))
    assert start == pytest.approx(math.log(1 + math.exp(3)), abs=0.1)
    assert "margin" not in without.trainer.train_dataset.column_names


def test_margins_that_a_row_lacks_are_refused_with_the_row(home: Path) -> None:
    rows = pairs(40, margin=1.0)
    del rows[5]["margin"]
    write_rows(home / "rows.jsonl", rows)
    with pytest.raises(SettingsError, match=r"1 of \d+ training pairs have no margin, such as rows.jsonl:6"):
        fixtures_training.prepare("reward_model", home, "margins=true", "data.held_out_size=0")


def test_the_adapter_s_dropout_acts_where_it_is_asked_for(paired: Path) -> None:
    shares = []
    for words in (("lora.lora_dropout=0.5",), ()):
        recipe = recipes.load("reward_model")
        recipe.module.save = lambda model, *_: model  # type: ignore[attr-defined]
        model = recipe.run(settings("reward_model", paired, "max_steps=1", *words))
        layer = model.get_base_model().model.layers[0].mlp.up_proj
        shares.append(getattr(layer.lora_dropout["default"], "p", 0.0))
    assert shares == [0.5, 0.0]


def test_training_goes_on_from_the_adapter_of_a_finished_lora_sft_run(lora_run: Artifact, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    home = lora_run.folder.parent
    rows = write_rows(tmp_path / "pairs.jsonl", pairs(40))
    parts = fixtures_training.prepare(
        "reward_model", home, f"lora.init_from={lora_run.folder}", f"data.path={rows}", f"output_dir={tmp_path / 'run'}"
    )
    name, weight = next(iter(load_file(lora_run.folder / "adapter_model.safetensors").items()))
    assert torch.equal(parts.model.get_parameter(name.replace(".weight", ".default.weight")), weight)


def test_pairs_without_a_side_and_pairs_that_are_all_equal_are_refused(home: Path) -> None:
    write_rows(home / "rows.jsonl", [{"prompt": "q", "chosen": f"a{n}"} for n in range(20)])
    with pytest.raises(DataError, match="this recipe needs preference rows"):
        fixtures_training.prepare("reward_model", home)
    write_rows(home / "rows.jsonl", [{"prompt": f"q{n}", "chosen": "a", "rejected": "a"} for n in range(20)])
    with pytest.raises(DataError, match="chosen and rejected are equal"):
        fixtures_training.prepare("reward_model", home)


def test_saved_scores_are_those_of_the_model_in_memory_by_the_package_too(good_run: Artifact) -> None:
    run = open_run(good_run.folder, [])
    tokenizer = load_tokenizer(run.config.model, saved=run.folder)
    data = load_data(run.config.data, run.config.kind, tokenizer, seed=run.config.train.seed)
    model = load_saved(run.config.model, run.folder, tokenizer, data.end_token_ids)
    good, bad = (
        score_rows(model, [[*row["prompt_ids"], *row[side]] for row in data.held_out])
        for side in ("chosen_ids", "rejected_ids")
    )
    margin = sum(x - y for x, y in zip(good, bad, strict=True)) / len(good)
    assert margin == pytest.approx(
        next(e["after"] for e in good_run.report.metrics if e["name"] == "reward_margin"), abs=1e-4
    )


@pytest.fixture(scope="module")
def own_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Artifact:
    """A whole run on LFM2, whose convolutions have no sequence classifier in transformers. Read only."""
    home = furnish(tmp_path_factory.mktemp("own"), tiny_model)
    write_rows(home / "rows.jsonl", pairs(80))
    base = write_model("lfm2", home / "lfm2", tiny_model)
    return train("reward_model", home, "max_steps=10", "learning_rate=1e-2", f"model.name_or_path={base}")


class TestWhereTransformersHasNoClass:
    def test_a_fresh_process_gave_the_same_score_by_the_lines_that_the_card_shows(
        self, own_run: Artifact, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert json.loads((own_run.folder / "report.json").read_text())["reload_max_logit_difference"] <= 1e-4
        base = own_run.folder.parent / "lfm2"
        code = shown(own_run.folder, base)
        assert "class Lfm2ForSequenceClassification(GenericForSequenceClassification, Lfm2PreTrainedModel):" in code
        assert "finetune_kit" not in code
        capsys.readouterr()
        exec(compile(code, "the card", "exec"), {})
        printed = float(capsys.readouterr().out)
        model = load_saved(ModelConfig(str(base)), own_run.folder, *_reading(own_run))
        assert printed == pytest.approx(score_rows(model, [_whole(own_run, "1 + 1 =", "2")])[0], abs=1e-5)

    def test_evaluate_measures_the_same_numbers_again(self, own_run: Artifact) -> None:
        again = compare_run(open_run(own_run.folder, []))
        for then, now in zip(own_run.report.metrics, again.metrics, strict=True):
            assert (now["before"], now["after"]) == pytest.approx((then["before"], then["after"]), abs=1e-5)

    def test_it_is_pushed_and_the_pushed_card_s_lines_load_it_from_the_hub(
        self, own_run: Artifact, hub: Hub, capsys: pytest.CaptureFixture[str]
    ) -> None:
        upload.send(kit_hub.prepare(own_run.folder, "ada/own", open_run(own_run.folder, []).config))
        assert "class Lfm2ForSequenceClassification" in hub.repos["ada/own"].files()["README.md"].decode()
        assert str(own_run.folder.parent).encode() not in hub.received()
        fetched = kit_hub.fetch("ada/own")
        code = shown(fetched, own_run.folder.parent / "lfm2").replace(str(fetched), "ada/own")
        capsys.readouterr()
        exec(compile(code, "the card", "exec"), {})
        assert float(capsys.readouterr().out)

    def test_pushed_it_is_a_reward_by_its_name_on_the_hub(self, own_run: Artifact, hub: Hub) -> None:
        upload.send(kit_hub.prepare(own_run.folder, "ada/own", open_run(own_run.folder, []).config))
        base = ModelConfig(str(own_run.folder.parent / "lfm2"))  # in the pushed run.yaml it is ./lfm2
        check_judge("reward.sources", "ada/own", base)
        data = SimpleNamespace(score=None, chat_template_kwargs={}, train_records=[], held_out_records=[])
        given = (["say 1"], ["good"], [Prompt("", [{"role": "user", "content": "say 1"}])])
        sources = ("ada/own", str(own_run.folder))
        configs = [RewardConfig([source], ignore_gate=True) for source in sources]
        there, here = (load_rewards(config, data, base)(*given)[0] for config in configs)
        assert there == here
        hub.add("ada/writes", {NAME: b'{"peft_type": "LORA", "task_type": "CAUSAL_LM"}'})
        with pytest.raises(SettingsError, match="ada/writes is an adapter that writes text: no reward model"):
            check_judge("reward.sources", "ada/writes", base)

    def test_merged_it_is_a_whole_model_with_the_same_scores_and_its_card_shows_the_class(
        self, own_run: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        made = merge(own_run.folder, tmp_path / "whole")
        assert made.results["reload_max_logit_difference"] <= 1e-4
        assert made.results["candidates"]["base"]["largest"] <= 1e-5
        assert table_of(made.results)[0][0] == "merged into"
        assert "a score differs from the trained model's by" in verdict_of(made.results)
        assert {"config.json", "model.safetensors", "merge.json"} <= {path.name for path in made.folder.iterdir()}
        assert not (made.folder / "adapter_config.json").exists()
        code = shown(made.folder, own_run.folder.parent / "lfm2")
        assert "PeftModel" not in code
        capsys.readouterr()
        exec(compile(code, "the card", "exec"), {})
        model = load_saved(ModelConfig(str(own_run.folder.parent / "lfm2")), own_run.folder, *_reading(own_run))
        expected = score_rows(model, [_whole(own_run, "1 + 1 =", "2")])[0]
        assert float(capsys.readouterr().out) == pytest.approx(expected, abs=1e-5)

    def test_it_judges_beside_the_policy_and_on_its_own_alike(self, own_run: Artifact) -> None:
        base = ModelConfig(str(own_run.folder.parent / "lfm2"))
        policy = load_policy(base, LoraConfig(r=4)).eval()
        assert shares_base(own_run.folder, base, policy)
        data = SimpleNamespace(score=None, chat_template_kwargs={}, train_records=[], held_out_records=[])
        config = RewardConfig([str(own_run.folder)], ignore_gate=True)
        records = [Prompt("", [{"role": "user", "content": text}]) for text in ("say 1", "say 22")]
        given = (["say 1", "say 22"], ["good", "a tall one"], records)
        beside, alone = (load_rewards(config, data, base, one)(*given)[0] for one in (policy, None))
        assert beside == pytest.approx(alone, abs=1e-5)


def shown(folder: Path, base: Path) -> str:
    """A card's Python, with the folder and its base where they are."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    return code.replace('folder = "."', f'folder = "{folder}"').replace(f'"{base.name}"', f'"{base}"')


def test_a_full_run_on_state_spaces_alone_is_a_whole_model_that_another_run_starts_from(paired: Path) -> None:
    base = write_model("mamba", paired / "mamba", paired / "tiny")
    run = train("reward_model", paired, "lora.r=0", "learning_rate=1e-3", "max_steps=4", f"model.name_or_path={base}")
    assert json.loads((run.folder / "config.json").read_text())["architectures"] == ["MambaForSequenceClassification"]
    assert json.loads((run.folder / "report.json").read_text())["reload_max_logit_difference"] <= 1e-4
    again = fixtures_training.prepare("reward_model", paired, f"model.name_or_path={run.folder}")
    saved = load_saved(again.config.model, run.folder, *_reading(run))
    assert torch.equal(again.model.get_base_model().score.original_module.weight, saved.score.weight)


@pytest.mark.long
@pytest.mark.parametrize("words", [(), ("load_in_4bit=true",), ("lora.r=0", "learning_rate=1e-3")])
@pytest.mark.parametrize("model_type", ["bamba", "mamba2", "gemma4", "falcon_h1", "nemotron_h", "phimoe"])
def test_runs_on_other_backbones_are_proven_and_verified(paired: Path, model_type: str, words: tuple[str, ...]) -> None:
    base = write_model(model_type, paired / model_type, paired / "tiny")
    run = train("reward_model", paired, *words, f"model.name_or_path={base}")
    assert json.loads((run.folder / "report.json").read_text())["reload_max_logit_difference"] <= 1e-4
    assert verify_run(open_run(run.folder, [])).difference is not None
