"""A merged model gives the logits of the adapter it was made of; of a 4-bit base, the nearer of two candidates."""

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from finetune_kit.data.chat import IGNORED
from finetune_kit.data.load import load_data
from finetune_kit.errors import NumericsError, ResourceError, SettingsError
from finetune_kit.evaluation.divergence import LOG_PROBS, choose_positions, divergence, log_probs
from finetune_kit.evaluation.measure import measure
from finetune_kit.models.load import load_base, load_policy
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.run_folder.claim import claim
from finetune_kit.run_folder.naming import IDENTITY
from finetune_kit.runs import merge as merging
from finetune_kit.runs.merge import (
    Merged,
    candidate_of,
    merge,
    merged_in_place,
    notes_of,
)
from finetune_kit.runs.save import Artifact, save_weights
from finetune_kit.runs.saved import FinishedRun, compare_run, model_of, open_run
from finetune_kit.runs.verify import TOLERANCE
from finetune_kit.training.begin import begin
from tests.fixtures_cli import cli
from tests.fixtures_training import fit_only, settings

IDS = torch.arange(5, 69)[None]
VARIETIES = [
    [],
    ["lora.use_rslora=true"],
    ["lora.use_dora=true"],
    ["lora.use_dora=true", "lora.use_rslora=true", "lora.modules_to_save=[lm_head]"],
    ["lora.lora_dropout=0.5"],
    ["lora.target_modules=[q_proj, down_proj]"],
    ["lora.modules_to_save=[lm_head]"],
    ["lora.modules_to_save=[embed_tokens]"],
    ["lora.modules_to_save=[embed_tokens, lm_head]"],
]


@pytest.fixture(scope="module")
def coarse(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with linear weights five times as large: 4 bits change what it says by much."""
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("model") / "coarse"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    for layer in model.model.layers:
        for parameter in layer.parameters():
            if parameter.ndim == 2:
                parameter.data *= 5
    model.save_pretrained(folder)
    return folder


def adapter_run(home: Path, *words: str, recipe: str = "lora_sft", noise: float = 0.05) -> FinishedRun:
    """A finished run's folder with an adapter that was not trained but moved at random, in half a second."""
    config = settings(recipe, home, *words)
    claim(config)
    tokenizer = load_tokenizer(config.model)
    data = load_data(config.data, "prompt_completion", tokenizer)
    policy = load_policy(config.model, config.lora)  # type: ignore[attr-defined]  # adapters only
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.data += noise * torch.randn_like(parameter)
    folder = begin(config, tokenizer, data, policy)
    (folder / IDENTITY).unlink()  # as a run that was pushed and fetched again
    save_weights(policy, tokenizer, config, data.end_token_ids, folder)
    return open_run(folder, [])


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(IDS).logits
    return result


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).abs().max())


def stored(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def through_a_file(model: PreTrainedModel, folder: Path) -> Any:
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


class TestMergedLogitsEqualTheAdapters:
    @pytest.mark.parametrize("words", VARIETIES, ids=lambda words: " ".join(words) or "plain")
    def test_in_memory_and_through_a_file(self, home: Path, tmp_path: Path, words: list[str]) -> None:
        run = adapter_run(home, *words)
        trained = logits(model_of(run))
        merged = merged_in_place(model_of(run))
        assert apart(trained, logits(load_base(run.config.model))) > 0.1
        assert apart(trained, logits(merged)) < 1e-5
        read = through_a_file(merged, tmp_path / "out")
        assert apart(logits(merged), logits(read)) == 0
        untied = "modules_to_save" in " ".join(words)
        assert read.config.tie_word_embeddings == (not untied)
        assert ("lm_head.weight" in stored(tmp_path / "out")) == untied

    @pytest.mark.parametrize("words", [VARIETIES[number] for number in (0, 3, 8)], ids=" ".join)
    def test_on_the_dequantised_base_those_of_the_adapter_on_4_bits(
        self, home: Path, coarse: Path, tmp_path: Path, words: list[str]
    ) -> None:
        run = adapter_run(home, f"model.name_or_path={coarse}", *words, recipe="qlora_sft")
        trained, merged = logits(model_of(run)), candidate_of(run, "dequantised")
        assert apart(trained, logits(merged)) < 1e-4
        assert apart(trained, logits(candidate_of(run, "base"))) > 0.1
        assert apart(logits(merged), logits(through_a_file(merged, tmp_path / "out"))) == 0
        assert not hasattr(merged.config, "quantization_config")

    def test_of_a_gpt2_whose_layers_keep_their_weights_the_other_way_round(self, home: Path, tmp_path: Path) -> None:
        config = GPT2Config(vocab_size=261, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=None)
        base = Path(shutil.copytree(home / "tiny", tmp_path / "gpt2"))
        GPT2LMHeadModel(config).save_pretrained(base)
        run = adapter_run(home, f"model.name_or_path={base}", recipe="qlora_sft")
        merged = candidate_of(run, "dequantised")
        assert apart(logits(model_of(run)), logits(merged)) < 1e-5
        assert apart(logits(merged), logits(through_a_file(merged, tmp_path / "out"))) == 0

    def test_with_3_tokens_more_than_the_base_has(self, home: Path, tmp_path: Path) -> None:
        run = adapter_run(home, "lora.modules_to_save=[embed_tokens, lm_head]")
        longer = load_base(run.config.model)
        longer.resize_token_embeddings(264, mean_resizing=False)
        from finetune_kit.models.adapters import attach

        policy = attach(longer, run.config.lora)  # type: ignore[attr-defined]
        policy.get_output_embeddings().weight.data[261:] += 1
        tokenizer = load_tokenizer(run.config.model)
        tokenizer.add_tokens(["<a>", "<b>", "<c>"])
        save_weights(policy, tokenizer, run.config, [3], run.folder)
        merged = merged_in_place(model_of(run))
        assert apart(logits(policy), logits(merged)) < 1e-5
        read = through_a_file(merged, tmp_path / "out")
        assert read.config.vocab_size == 264
        assert apart(logits(merged), logits(read)) == 0

    @pytest.mark.parametrize("word", ["lora.r=16", "lora.use_dora=true", "lora.modules_to_save=[lm_head]"])
    def test_a_bfloat16_base_stays_bfloat16(self, home: Path, word: str) -> None:
        run = adapter_run(home, "model.dtype=bfloat16", word)
        trained = logits(model_of(run))
        merged = merged_in_place(model_of(run))
        assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
        assert apart(trained, logits(merged)) < 0.02 * float(trained.abs().max())

    def test_an_adapter_on_tied_embeddings_merges_wrong_and_is_refused(self, home: Path, tmp_path: Path) -> None:
        import peft

        run = adapter_run(home)
        policy = peft.get_peft_model(
            load_base(run.config.model), peft.LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False)
        )
        save_weights(policy, load_tokenizer(run.config.model), run.config, [3], run.folder)
        with pytest.raises(NumericsError, match="differ by") as caught:
            merge(run.folder, tmp_path / "out")
        assert "tied embeddings" in caught.value.fix
        assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def head_run(shared_home: Path) -> FinishedRun:
    """A run whose head was trained in full."""
    return adapter_run(shared_home, "lora.modules_to_save=[lm_head]")


@pytest.fixture(scope="module")
def plain(head_run: FinishedRun, shared_home: Path) -> Merged:
    """`head_run` merged into shards of at most 50 kB."""
    (shared_home / "out").mkdir()  # an empty folder may be there
    return merge(head_run.folder, shared_home / "out", max_shard_size="50KB")


@pytest.fixture
def read_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The saved model is read back in this process: a fresh one takes 5 s, and `plain` and `quantised` have one."""

    def read(
        _model: Any, folder: Path, probe: list[int], dtype: torch.dtype, _device: Any, **_more: Any
    ) -> torch.Tensor:
        with torch.inference_mode():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            result: torch.Tensor = model(torch.tensor([probe])).logits
        return result

    monkeypatch.setattr(merging, "reload_logits", read)


class TestFolder:
    def test_it_loads_in_plain_transformers_with_the_adapters_logits(
        self, plain: Merged, head_run: FinishedRun
    ) -> None:
        model = AutoModelForCausalLM.from_pretrained(plain.folder)
        assert apart(logits(model), logits(model_of(head_run))) < 1e-5
        assert model.config.tie_word_embeddings is False
        assert plain.results["reload_max_logit_difference"] <= TOLERANCE

    def test_its_shards_keep_to_the_size_and_its_index_names_files_beside_it(self, plain: Merged) -> None:
        index = json.loads((plain.folder / "model.safetensors.index.json").read_text())
        files = set(index["weight_map"].values())
        assert files == {path.name for path in plain.folder.glob("*.safetensors")}
        assert len(files) > 5
        largest_tensor = 261 * 64 * 4
        assert max((plain.folder / name).stat().st_size for name in files) < largest_tensor + 1000

    def test_no_file_names_a_local_path_and_nothing_of_the_adapter_is_left(
        self, plain: Merged, shared_home: Path
    ) -> None:
        for path in plain.folder.iterdir():
            assert str(shared_home).encode() not in path.read_bytes(), path.name
            assert not path.name.startswith("adapter")

    def test_its_template_renders_the_tokens_that_were_trained(self, plain: Merged, head_run: FinishedRun) -> None:
        config = head_run.config
        data = load_data(config.data, "prompt_completion", load_tokenizer(config.model))
        tokenizer = AutoTokenizer.from_pretrained(plain.folder)
        for row in data.train:
            record = data.train_records[row["row"]]
            prompt = tokenizer.apply_chat_template(record.messages[:1], add_generation_prompt=True)["input_ids"]
            trained = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == IGNORED]
            assert prompt == trained

    def test_whoever_may_read_its_config_may_read_its_weights(self, plain: Merged) -> None:
        assert len({path.stat().st_mode for path in plain.folder.iterdir()}) == 1

    def test_it_knows_where_an_answer_ends(self, plain: Merged) -> None:
        assert json.loads((plain.folder / "generation_config.json").read_text())["eos_token_id"] == [3]

    def test_merge_json_says_what_was_merged_and_how_far_that_moved_the_model(
        self, plain: Merged, head_run: FinishedRun
    ) -> None:
        results = json.loads((plain.folder / "merge.json").read_text())
        assert results == plain.results
        assert (results["candidate"], results["base"]["name"]) == ("base", "tiny")
        assert results["run"] == head_run.folder.name
        assert results["candidates"]["base"]["kl_per_token"] < 1e-6 < 0.01 < results["finetune_kl_per_token"]
        assert results["max_logit_difference"] < 1e-5
        assert results["tied_embeddings"] is False
        assert results["versions"]["peft"]

    def test_the_card_has_the_table_the_licence_and_the_settings(self, plain: Merged) -> None:
        card = (plain.folder / "README.md").read_text()
        assert card.startswith("---\nlicense: other\nlibrary_name: transformers\n")
        assert "| (as trained) | 0 | 0 | 100.0% |" in card
        assert "| base | " in card
        assert "name_or_path: tiny" in card

    def test_it_is_the_base_of_a_further_run(self, plain: Merged, shared_home: Path) -> None:
        further = fit_only("lora_sft", shared_home, f"model.name_or_path={plain.folder}", "max_steps=1")
        assert further.moved > 0

    @pytest.mark.usefixtures("read_here")
    def test_a_trained_run_merges_with_its_report_in_the_card(self, lora_run: Artifact, tmp_path: Path) -> None:
        merged = merge(lora_run.folder, tmp_path / "new" / "out")
        assert lora_run.report.verdict in (merged.folder / "README.md").read_text()
        assert [path.name for path in merged.folder.parent.iterdir()] == ["out"]


@pytest.fixture(scope="module")
def quantised(shared_home: Path, coarse: Path) -> tuple[FinishedRun, Merged, list[int]]:
    """A 4-bit run, the model merged of it, and how many models were in memory whenever another was about to be read."""
    words = [f"model.name_or_path={coarse}", "evaluate.size=3", "held_out_size=6"]
    run = adapter_run(shared_home, *words, recipe="qlora_sft")
    before, seen = models_in_memory(), []

    def watched(function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            seen.append(models_in_memory() - before)
            return function(*arguments, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune_kit.models.load.load_base", watched(load_base))
        patch.setattr(merging, "reload_logits", watched(merging.reload_logits))
        merged = merge(run.folder, shared_home / "of4")
    return run, merged, seen


def models_in_memory() -> int:
    gc.collect()
    return sum(isinstance(thing, PreTrainedModel) and hasattr(thing, "lm_head") for thing in gc.get_objects())


class TestCandidatesOfA4BitBase:
    def test_the_dequantised_base_is_nearer_to_what_was_trained_and_is_taken(self, quantised: Any) -> None:
        run, merged, _ = quantised
        results = merged.results
        found = results["candidates"]
        assert found["dequantised"]["kl_per_token"] < 1e-6 < 1e-3 < found["base"]["kl_per_token"]
        assert results["candidate"] == "dequantised"
        model = AutoModelForCausalLM.from_pretrained(merged.folder)
        assert apart(logits(model), logits(model_of(run))) < 1e-4

    def test_all_numbers_are_those_that_evaluate_gives(self, quantised: Any) -> None:
        run, merged, _ = quantised
        report = compare_run(run)
        after = {entry["name"]: entry["after"] for entry in report.metrics}
        trained, best = merged.results["trained"], merged.results["candidates"]["dequantised"]
        assert list(trained) == ["held_out_loss", "exact_match"]
        assert trained["held_out_loss"] == pytest.approx(after["held_out_loss"], abs=1e-5)
        assert best["held_out_loss"] == pytest.approx(after["held_out_loss"], abs=1e-4)
        assert trained["exact_match"] == after["exact_match"]

    def test_the_card_shows_both_candidates_beside_the_trained_model(self, quantised: Any) -> None:
        _, merged, _ = quantised
        card = (merged.folder / "README.md").read_text()
        for line in ("(as trained)", "base", "dequantised base"):
            assert f"| {line} |" in card
        assert "Merged into the dequantised base: KL(trained || merged) is" in card

    def test_one_model_at_a_time_is_in_memory(self, quantised: Any) -> None:
        *_, seen = quantised
        assert seen == [0, 0, 0, 0]  # before the trained one, the two candidates, and the fresh process

    @pytest.mark.usefixtures("read_here")
    def test_a_candidate_that_is_named_is_taken_and_the_only_one_that_is_measured(
        self, quantised: Any, tmp_path: Path
    ) -> None:
        run, merged, _ = quantised
        forced = merge(run.folder, tmp_path / "out", candidate="base", size=4).results
        assert list(forced["candidates"]) == ["base"]
        assert forced["candidate"] == "base"
        assert forced["kl_measured_on"]["rows"] == 4
        assert merged.results["kl_measured_on"]["rows"] == 6

    @pytest.mark.usefixtures("read_here")
    def test_the_one_that_was_measured_first_is_made_again_where_it_is_nearer(
        self, quantised: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run, *_ = quantised
        monkeypatch.setattr(merging, "CANDIDATES", ("dequantised", "base"))
        merged = merge(run.folder, tmp_path / "out", size=2)
        assert merged.results["candidate"] == "dequantised"
        assert apart(logits(AutoModelForCausalLM.from_pretrained(merged.folder)), logits(model_of(run))) < 1e-4


class TestDivergence:
    def test_of_a_model_from_itself_it_is_0_and_every_top_token_is_the_same(self, tiny_model: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        rows = [(list(range(5, 40)), [3, 20, 34]), (list(range(40, 60)), [0, 19])]
        found = divergence(model, rows, torch.cat(list(log_probs(model, rows))))
        assert found == {"kl_per_token": 0, "kl_largest": 0, "same_top_token": 1}

    def test_it_is_the_sum_over_the_vocabulary_of_p_log_p_over_q(self, tiny_model: Path, coarse: Path) -> None:
        one, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_model, coarse))
        rows = [(IDS[0].tolist(), [1, 30, 63])]
        p, q = (logits(model).double().softmax(-1)[0, rows[0][1]] for model in (one, other))
        expected = (p * (p / q).log()).sum(-1)
        found = divergence(other, rows, torch.cat(list(log_probs(one, rows))))
        assert found["kl_per_token"] == pytest.approx(float(expected.mean()), rel=1e-4)
        assert found["kl_largest"] == pytest.approx(float(expected.max()), rel=1e-4)

    def test_positions_are_512_of_64_rows_evenly_and_each_predicts_a_supervised_token(self) -> None:
        rows = [([*range(100)], [IGNORED] * 40 + [7] * 60) for _ in range(200)]
        chosen = choose_positions(rows, vocabulary=1000)
        assert len(chosen) == 64
        assert sum(len(positions) for _, positions in chosen) == 512
        assert {len(positions) for _, positions in chosen} == {8}
        assert all(39 <= at <= 98 and len(ids) == max(positions) + 1 for ids, positions in chosen for at in positions)

    def test_a_vocabulary_of_a_million_leaves_67_positions(self) -> None:
        rows = [([*range(100)], [7] * 100) for _ in range(10)]
        assert sum(len(positions) for _, positions in choose_positions(rows, 10**6)) == LOG_PROBS // 10**6 == 67

    def test_rows_with_nothing_supervised_are_left_out(self) -> None:
        rows = [([1, 2, 3], [IGNORED] * 3), ([4, 5, 6], [4, IGNORED, 6])]
        assert choose_positions(rows, 10) == [([4, 5], [1])]

    def test_where_loss_or_score_speak_for_the_other_one_that_is_said(self) -> None:
        base = {"kl_per_token": 0.2, "held_out_loss": 1.0, "exact_match": 0.5}
        dequantised = {"kl_per_token": 0.1, "held_out_loss": 1.1, "exact_match": 0.5}
        results: dict[str, Any] = {
            "candidate": "dequantised",
            "trained": {"held_out_loss": 1.1, "exact_match": 0.5},
            "candidates": {"base": base, "dequantised": dequantised},
            "finetune_kl_per_token": 0.15,
        }
        assert notes_of(results) == ["held_out_loss speaks for base: 1.0000 against 1.1000."]
        results["finetune_kl_per_token"] = 0.05
        assert "further (0.1000 nats a token) than the fine-tune had (0.0500)" in notes_of(results)[1]


class TestBadInput:
    def test_a_whole_model_is_nothing_to_merge(self, tiny_model: Path, head_run: FinishedRun, tmp_path: Path) -> None:
        full = Path(shutil.copytree(tiny_model, tmp_path / "full"))
        shutil.copy(head_run.folder / "run.yaml", full)
        for folder in (tiny_model, full):
            with pytest.raises(SettingsError, match="nothing to merge") as caught:
                merge(folder, tmp_path / "out")
            assert f"model.name_or_path={folder}" in caught.value.fix

    def test_an_adapter_without_run_yaml_is_no_run(self, head_run: FinishedRun, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(head_run.folder, tmp_path / "adapter"))
        (folder / "run.yaml").unlink()
        with pytest.raises(SettingsError, match=r"no run\.yaml"):
            merge(folder, tmp_path / "out")

    def test_a_folder_that_is_not_empty_is_left_as_it_is(self, head_run: FinishedRun, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("x")
        for out in (tmp_path / "out", tmp_path / "out" / "mine", head_run.folder):
            with pytest.raises(SettingsError, match="is not empty; nothing in it was touched"):
                merge(head_run.folder, out)
        assert (tmp_path / "out" / "mine").read_text() == "x"

    def test_a_broken_report_is_told_before_the_work(
        self, head_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = Path(shutil.copytree(head_run.folder, tmp_path / "broken"))
        (folder / "report.json").write_text('{"verdict": ')
        monkeypatch.setattr(merging, "tokenizer_of", lambda run: pytest.fail("the work began"))
        with pytest.raises(SettingsError, match=r"broken/report\.json"):
            merge(folder, tmp_path / "out")

    def test_a_folder_that_cannot_be_made_is_refused_before_the_work(
        self, head_run: FinishedRun, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(SettingsError, match="cannot be made"):
            merge(head_run.folder, tmp_path / "file" / "out")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"candidate": "4bit"}, "expected base, dequantised or auto"),
            ({"candidate": "base"}, "--candidate has no effect"),
            ({"size": 5}, "--size has no effect"),
            ({"max_shard_size": "5"}, "--max-shard-size 5: expected"),
            ({"max_shard_size": "0GB"}, "--max-shard-size 0GB: expected"),
            ({"max_shard_size": "5GiB"}, "--max-shard-size 5GiB: expected"),
        ],
    )
    def test_arguments_that_cannot_act(
        self, head_run: FinishedRun, tmp_path: Path, arguments: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(SettingsError, match=message):
            merge(head_run.folder, tmp_path / "out", **arguments)

    def test_no_rows_to_measure_on(self, quantised: Any, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match="--size 0: expected 1 row or more"):
            merge(quantised[0].folder, tmp_path / "out", size=0)

    def test_weights_that_do_not_come_back_leave_nothing(
        self, head_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(merging, "reload_logits", lambda *_, **__: torch.zeros(1, 64, 261))
        with pytest.raises(NumericsError, match="is not what was trained: loaded, its outputs differ by"):
            merge(head_run.folder, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_a_disk_that_is_too_small_is_said_before_writing(
        self, head_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = type("Usage", (), {"free": 1000})
        monkeypatch.setattr(merging.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(ResourceError, match="GiB left"):
            merge(head_run.folder, tmp_path / "out")

    def test_on_the_command_line_it_ends_with_2_and_the_way_out(self, tiny_model: Path, tmp_path: Path) -> None:
        said = cli("merge", tiny_model, tmp_path / "out")
        assert said.code == 2
        assert "nothing to merge" in said.err
        assert "Traceback" not in said.err

    @pytest.mark.usefixtures("read_here")
    def test_on_the_command_line_the_table_and_the_folder_are_shown(
        self, head_run: FinishedRun, tmp_path: Path
    ) -> None:
        said = cli("merge", head_run.folder, tmp_path / "out", "--max-shard-size", "1GB")
        assert said.code == 0, said.err
        assert "Merged into the base: KL(trained || merged) is" in said.out
        assert f"model.name_or_path={tmp_path / 'out'}" in said.out


class TestAnotherBase:
    """An adapter remembers its base in base.json; merge, evaluate and generate load it on no other one."""

    @pytest.fixture
    def run(self, home: Path, tiny_model: Path) -> FinishedRun:
        (home / "tiny").unlink()
        shutil.copytree(tiny_model, home / "tiny")
        return adapter_run(home)

    def test_the_record_has_the_name_the_architecture_and_a_hash_of_the_weights(self, run: FinishedRun) -> None:
        record = json.loads((run.folder / "base.json").read_text())
        assert (record["name"], record["revision"], record["config"]["hidden_size"]) == ("tiny", None, 64)
        assert len(record["weights"]) == 64
        assert not {"dtype", "eos_token_id", "transformers_version"} & record["config"].keys()

    def test_other_settings_are_refused_by_name(self, run: FinishedRun, home: Path, tmp_path: Path) -> None:
        path = home / "tiny" / "config.json"
        config = json.loads(path.read_text())
        config["rms_norm_eps"] = 1e-5
        path.write_text(json.dumps(config))
        for use in (model_of, compare_run, lambda run: merge(run.folder, tmp_path / "out")):
            with pytest.raises(SettingsError, match="rms_norm_eps 1e-06 → 1e-05") as caught:
                use(run)
            assert f"{run.folder} is an adapter of tiny" in caught.value.message

    def test_other_weights_of_the_same_shapes_are_refused(self, run: FinishedRun, home: Path) -> None:
        other = AutoModelForCausalLM.from_pretrained(home / "tiny")
        other.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1e-3
        other.save_pretrained(home / "tiny")
        with pytest.raises(SettingsError, match="the same shapes, other weights"):
            model_of(run)

    def test_the_same_base_in_shards_elsewhere_with_other_token_ids_is_the_same(
        self, run: FinishedRun, home: Path
    ) -> None:
        trained = logits(model_of(run))
        same = AutoModelForCausalLM.from_pretrained(home / "tiny")
        (home / "tiny" / "model.safetensors").unlink()
        same.config.eos_token_id = 1
        same.save_pretrained(home / "tiny", max_shard_size="50KB")
        run.config.model.name_or_path = str((home / "tiny").rename(home / "moved"))
        assert apart(trained, logits(model_of(run))) == 0

    def test_without_a_record_an_adapter_is_trusted(self, run: FinishedRun, home: Path) -> None:
        (run.folder / "base.json").unlink()
        assert model_of(run) is not None


def test_the_losses_of_a_merged_model_are_those_of_the_adapter(plain: Merged, head_run: FinishedRun) -> None:
    config = head_run.config
    tokenizer = load_tokenizer(config.model)
    data = load_data(config.data, "prompt_completion", tokenizer)
    merged = AutoModelForCausalLM.from_pretrained(plain.folder)
    losses = [measure(model, tokenizer, data, config.evaluate).nll for model in (model_of(head_run), merged)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
