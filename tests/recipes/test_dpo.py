"""dpo: the reference is the policy's start, the losses are TRL's on our tokens, and the report says what changed."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from finetune_kit.data.tokenise import sequences
from finetune_kit.errors import DataError, NumericsError, SettingsError
from finetune_kit.evaluation.loss import row_losses
from finetune_kit.models.adapters import is_adapter
from finetune_kit.recipe import load
from finetune_kit.runs.save import Artifact
from finetune_kit.settings.load import resolve
from finetune_kit.training import reference
from tests.fixtures_training import Trained, fit_only, furnish_pairs, prepare, train
from tests.models.small import write_model

PAIRS = [{"prompt": f"{n} + {n} =", "chosen": f"it is {2 * n}", "rejected": f"no {n}"} for n in range(40)]


@pytest.fixture
def home(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FINETUNE_KIT_CACHE", str(tmp_path / "cache"))
    return furnish_pairs(tmp_path, tiny_model, PAIRS)


def log_probs(run: Trained, rows: list[dict[str, Any]], side: str) -> torch.Tensor:
    """Log-probability of each row's answer under the run's policy, nats."""
    nll, _ = row_losses(run.model, [sequences(row)[side] for row in rows], [""] * len(rows), 4)
    return -torch.tensor(nll)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Artifact:
    """A whole run: 12 steps on 34 pairs, 6 held out and answered, held-out losses after 6 and 12."""
    home = furnish_pairs(tmp_path_factory.mktemp("dpo"), tiny_model, PAIRS)
    words = ("max_steps=12", "eval_steps=6", "learning_rate=5e-3", "held_out_size=6", "evaluate.size=6")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_KIT_CACHE", str(home / "cache"))
        return train("dpo", home, *words)


def test_a_whole_run_raises_accuracy_and_margin_of_its_implicit_reward(artifact: Artifact) -> None:
    found = {entry["name"]: entry for entry in artifact.report.metrics}
    assert found["preference_accuracy"]["before"] == 0.5 < found["preference_accuracy"]["after"]
    assert found["reward_margin"]["before"] == 0.0 < found["reward_margin"]["after"]
    assert found["kl_to_reference"]["before"] == 0 < found["kl_to_reference"]["after"]
    assert {"chosen_is_likelier", "rejected_loss", "held_out_loss", "answer_tokens", "exact_match"} <= found.keys()


def test_the_margin_of_the_report_is_beta_times_the_gain_of_chosen_over_rejected(artifact: Artifact) -> None:
    found = {entry["name"]: entry for entry in artifact.report.metrics}
    lines = [json.loads(line) for line in (artifact.folder / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "eval_loss" in line][-1]
    assert last["eval_preference_accuracy"] == found["preference_accuracy"]["after"]
    # equal margins would give exactly this; unequal ones a little more
    assert last["eval_loss"] >= math.log1p(math.exp(-found["reward_margin"]["after"]))


def test_the_first_loss_is_ln_2_and_the_first_rewards_are_0(artifact: Artifact) -> None:
    first = json.loads((artifact.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("words", [(), ("lora.r=0",), ("lora.use_dora=true",), ("padding_free=false",)])
def test_the_loss_is_the_formula_of_the_docstring(home: Path, words: tuple[str, ...]) -> None:
    start = prepare("dpo", home, *words)
    rows = [start.trainer.train_dataset[index] for index in range(4)]
    old = {side: log_probs(start, rows, side) for side in ("chosen", "rejected")}
    trained = fit_only("dpo", home, "max_steps=3", "learning_rate=1e-2", "beta=0.3", *words)
    new = {side: log_probs(trained, rows, side) for side in ("chosen", "rejected")}
    margins = 0.3 * ((new["chosen"] - old["chosen"]) - (new["rejected"] - old["rejected"]))
    batch = trained.trainer.data_collator(rows)
    with torch.no_grad():
        loss = trained.trainer.compute_loss(trained.model.eval(), batch)
    assert float(loss) == pytest.approx(float(-torch.nn.functional.logsigmoid(margins).mean()), abs=1e-5)
    assert float(margins.abs().max()) > 0.01


@pytest.mark.parametrize("words", [(), ("lora.r=0",)])
def test_precomputed_and_running_references_give_the_same_losses(home: Path, words: tuple[str, ...]) -> None:
    kept = fit_only("dpo", home, "max_steps=4", "learning_rate=5e-3", *words)
    running = fit_only("dpo", home, "max_steps=4", "learning_rate=5e-3", "precompute_ref_log_probs=false", *words)
    assert kept.losses == pytest.approx(running.losses, abs=1e-5)
    made = prepare("dpo", home, "precompute_ref_log_probs=false", *words).trainer
    assert (made.ref_model is None) == is_adapter(made.model)
    assert running.trainer.ref_model is None  # let go of after training
    assert kept.trainer.ref_model is None


def test_padded_and_packed_batches_give_the_same_losses(home: Path) -> None:
    packed = fit_only("dpo", home, "max_steps=4", "learning_rate=5e-3")
    padded = fit_only("dpo", home, "max_steps=4", "learning_rate=5e-3", "padding_free=false")
    assert packed.losses == pytest.approx(padded.losses, abs=1e-5)


def test_4_bit_policies_start_at_ln_2_with_adapters_in_float32(home: Path) -> None:
    run = fit_only("dpo", home, "model.load_in_4bit=true", "learning_rate=5e-3", "max_steps=3")
    assert run.losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert run.losses[-1] < run.losses[0]
    assert {weight.dtype for weight in run.weights.values()} == {torch.float32}


def test_the_references_numbers_are_read_again_and_only_for_the_same_tokens_and_weights(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    compute = reference._compute

    def counted(policy: Any, config: Any, data: Any) -> Any:
        computed.append(len(data.train))
        return compute(policy, config, data)

    monkeypatch.setattr(reference, "_compute", counted)
    prepare("dpo", home)
    prepare("dpo", home, "learning_rate=1e-3", "beta=0.5")
    assert computed == [37]
    prepare("dpo", home, "data.system_prompt=Be brief.")
    assert computed == [37, 37]


def test_an_adapter_to_go_on_from_is_the_reference_whether_precomputed_or_not(home: Path) -> None:
    sft = train("dpo", home, "learning_rate=2e-2", "max_steps=4")
    words = (f"lora.init_from={sft.folder}", "learning_rate=5e-3", "max_steps=4")
    kept = fit_only("dpo", home, *words)
    running = fit_only("dpo", home, *words, "precompute_ref_log_probs=false")
    assert kept.losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert kept.losses == pytest.approx(running.losses, abs=1e-5)
    assert list(kept.model.peft_config) == ["default"]
    assert list(running.model.peft_config) == ["default", "ref"]


def test_the_frozen_copy_of_an_adapter_is_not_saved(home: Path) -> None:
    first = train("dpo", home)
    second = train("dpo", home, f"lora.init_from={first.folder}", "precompute_ref_log_probs=false")
    assert not (second.folder / "ref").exists()
    assert (second.folder / "adapter_model.safetensors").is_file()


def test_other_weights_under_the_same_name_have_numbers_of_their_own(home: Path, tmp_path: Path) -> None:
    model = shutil.copytree(home / "tiny", tmp_path / "model")
    name = f"model.name_or_path={model}"
    prepare("dpo", home, name)
    weights = load_file(model / "model.safetensors")
    norm = next(key for key in weights if key.endswith("norm.weight"))
    weights[norm][1:] += 0.5  # the first number, which a quick look at a tensor reads, stays
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    prepare("dpo", home, name)  # with the old numbers it would refuse


def test_the_copy_of_an_adapter_that_is_the_reference_has_no_dropout(home: Path) -> None:
    first = train("dpo", home, "learning_rate=2e-2", "max_steps=4")
    words = (f"lora.init_from={first.folder}", "precompute_ref_log_probs=false", "lora.lora_dropout=0.5")
    run = prepare("dpo", home, *words)
    batch = run.trainer.data_collator([run.trainer.train_dataset[0]])
    run.model.train()
    once, again = (run.trainer.compute_ref_log_probs(run.model, batch) for _ in range(2))
    assert torch.equal(torch.cat(once), torch.cat(again))


def test_a_tokenizer_with_more_tokens_than_the_model_has_embeddings_is_refused(home: Path, tmp_path: Path) -> None:
    model = shutil.copytree(home / "tiny", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(model)
    assert "has embeddings for 261 tokens, its tokenizer has 262." in refused(home, f"model.name_or_path={model}")


def test_another_reference_than_the_policys_start_is_noticed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = reference._compute
    monkeypatch.setattr(
        reference, "_compute", lambda *given: {side: values + 0.1 for side, values in compute(*given).items()}
    )
    with pytest.raises(NumericsError, match="The reference is not the policy's start"):
        prepare("dpo", home)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_of_experts_the_first_loss_is_ln_2_where_the_routers_are_left_out_and_training_keeps_theirs(
    home: Path, model_type: str
) -> None:
    base = write_model(model_type, home / model_type, home / "tiny", router_aux_loss_coef=0.1)
    run = prepare("dpo", home, f"model.name_or_path={base}")  # which proves the first loss
    batch = next(iter(run.trainer.get_train_dataloader()))
    both = run.trainer.compute_loss(run.model.eval(), dict(batch)).item()
    run.trainer.aux_loss_enabled = False
    alone = run.trainer.compute_loss(run.model, dict(batch)).item()
    assert alone == pytest.approx(math.log(2), abs=1e-5)
    assert both > alone + 0.1  # balanced routers have 1 for each expert that a token goes to


@pytest.mark.parametrize("loss", ["[ipo]", "[hinge]", "[sigmoid, sft]", "[sigmoid_norm]", "[apo_zero]", "[robust]"])
def test_losses_of_trl_train_by_name(home: Path, loss: str) -> None:
    run = fit_only("dpo", home, f"loss_type={loss}", "learning_rate=5e-3", "max_steps=8")
    assert run.losses[-1] < run.losses[0]


def test_dropout_of_the_adapter_acts_although_trl_switches_dropout_off_by_default(home: Path) -> None:
    words = ("learning_rate=5e-3", "max_steps=4")
    assert fit_only("dpo", home, *words).losses != fit_only("dpo", home, "lora.lora_dropout=0.5", *words).losses


def test_weights_of_two_losses_act(home: Path) -> None:
    both = fit_only("dpo", home, "loss_type=[sigmoid, sft]", "loss_weights=[1, 0]", "max_steps=1")
    assert both.losses[0] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.long
def test_label_smoothing_keeps_margins_smaller_where_the_loss_has_it(home: Path) -> None:
    words = ("learning_rate=2e-2", "max_steps=30", "beta=1")
    smooth = fit_only("dpo", home, "loss_type=[robust]", "label_smoothing=0.3", *words)
    sharp = fit_only("dpo", home, *words)
    assert smooth.history[-1]["rewards/margins"] < sharp.history[-1]["rewards/margins"]
    assert "label_smoothing has no effect on loss_type=['sigmoid']" in refused(home, "label_smoothing=0.3")


def refused(home: Path, *words: str) -> str:
    with pytest.raises((SettingsError, DataError)) as caught:
        prepare("dpo", home, *words)
    return str(caught.value)


def test_settings_that_cannot_be_are_refused(home: Path) -> None:
    for word, message in {
        "beta=0": r"beta (command line): expected a number in (0, 10], found 0.",
        "beta=-1": r"beta (command line): expected a number in (0, 10], found -1.",
        "label_smoothing=0.5": r"label_smoothing (command line): expected a number in [0, 0.5), found 0.5.",
        "loss_type=[simgoid]": "loss_type=['simgoid']: Unknown loss type: simgoid.",
        "loss_weights=[1, 2]": "DPOConfig refuses these settings",
        "loss_type=[]": "loss_type is empty",
        "train.extra.beta=0.5": "train.extra.beta: the recipe sets it.",
        "train.extra.sync_ref_model=true": "the reference is the policy's start",
        "data.packing=true": "data.packing has no effect on preference rows.",
    }.items():
        assert message in refused(home, word)


def test_pairs_that_are_all_equal_leave_nothing_to_train_on(home: Path) -> None:
    rows = [{"prompt": f"{n}", "chosen": "same", "rejected": "same"} for n in range(8)]
    (home / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert "rows would be lost (100%, allowed 5%)" in refused(home)
    assert "chosen and rejected are equal" in refused(home)


def test_rows_of_another_kind_are_named_with_what_is_expected(home: Path) -> None:
    (home / "rows.jsonl").write_text("\n".join(json.dumps({"question": f"{n}", "answer": "x"}) for n in range(8)))
    assert "this recipe needs preference rows" in refused(home)


def test_beta_and_the_kind_of_rows_stand_in_show() -> None:
    recipe = load("dpo")
    config = resolve(recipe.config_class, "dpo", None, ["beta=0.2"])
    assert (config.kind, config.origins["beta"]) == ("preference", "command line")
