"""What would end a run late is refused before anything is read, in check and in run."""

import errno
import inspect
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from finetune_kit.data.chat import render_prompt
from finetune_kit.data.records import prompt_of
from finetune_kit.errors import DataError, ResourceError, SettingsError
from finetune_kit.evaluation.measure import measure
from finetune_kit.models import embedded
from finetune_kit.models.generation_config import mend_generation_config
from finetune_kit.models.load import load_base
from finetune_kit.models.shapes import learned_positions
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.planning.preflight import LOSSES
from finetune_kit.settings.schema import EvaluateConfig, ModelConfig
from finetune_kit.training import resources
from tests.fixtures_cli import cli
from tests.fixtures_evaluation import held_out, tiny_gpt2


@pytest.mark.parametrize("command", ["check", "run"])
def test_samples_longer_than_the_positions_of_gpt2_are_refused_with_the_setting_that_mends_it(
    command: str, home: Path
) -> None:
    shutil.copytree(home / "tiny", home / "gpt2")
    (home / "gpt2" / "model.safetensors").unlink()
    tiny_gpt2().save_pretrained(home / "gpt2")  # 512 positions
    words = (f"model.name_or_path={home / 'gpt2'}", f"data.path={home / 'rows.jsonl'}")
    said = cli(command, "lora_sft", *words)
    assert said.code == 2
    assert "has positions for 512 tokens; data.max_length=1,024 would be more.\nSet data.max_length=512" in said.err
    said = cli(command, "grpo", words[0], "data.max_length=500")
    assert "data.max_length=500 and 64 sampled ones would be more.\nSet data.max_length=448" in said.err
    assert not (home / "runs").exists()


@pytest.mark.parametrize(
    ("recipe", "word"),
    [
        ("dpo", "loss_type=[simpo]"),
        ("dpo", "loss_type=[sigmoid,sigmod]"),
        ("dpo", "loss_type=[]"),
        ("dpo", "loss_weights=[1,2]"),
        ("kto", "train.extra={loss_type: sigmoid}"),
        ("grpo", "train.extra={loss_type: ppo}"),
        ("lora_sft", "train.extra={loss_type: cross_entropy}"),
    ],
)
def test_a_loss_that_is_none_is_refused_at_once(
    recipe: str, word: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    for command in ("check", "run"):
        said = cli(command, recipe, "model.name_or_path=tiny", "data.path=not_read.jsonl", word)
        assert said.code == 2, said.err
        assert "loss_" in said.err
    assert sorted(path.name for path in home.iterdir()) == ["rows.jsonl", "tiny"]


def with_positions(home: Path, kind: str) -> Path:
    """The tiny tokenizer beside a model that has 128 learned positions; OPT's table has two rows more."""
    sizes = {"vocab_size": 261, "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
    if kind == "opt":
        own = {"ffn_dim": 32, "word_embed_proj_dim": 32, "max_position_embeddings": 128}
        model = OPTForCausalLM(OPTConfig(**sizes, **own, pad_token_id=0, bos_token_id=1, eos_token_id=3))
    else:
        model = GPT2LMHeadModel(GPT2Config(**sizes, n_positions=128, bos_token_id=1, eos_token_id=3))
    shutil.copytree(home / "tiny", home / kind)
    (home / kind / "model.safetensors").unlink()
    model.save_pretrained(home / kind)
    return home / kind


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_learned_positions_are_128_with_and_without_the_two_rows_more_of_opt(kind: str, home: Path) -> None:
    said = cli("check", "lora_sft", f"model.name_or_path={with_positions(home, kind)}", "data.max_length=129")
    assert said.code == 2
    assert f"{kind} has positions for 128 tokens; data.max_length=129 would be more." in said.err
    assert learned_positions(ModelConfig(name_or_path=str(home / kind))) == 128


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_answers_end_where_the_learned_positions_do_and_a_prompt_that_fills_them_is_refused(
    kind: str, home: Path
) -> None:
    model = load_base(ModelConfig(name_or_path=str(with_positions(home, kind))))
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(home / kind)))
    data = held_out(tokenizer, [("a" * 80, "b"), ("c", "d"), ("e" * 60, "f")])
    found = measure(model, tokenizer, data, EvaluateConfig(max_new_tokens=60))
    room = [128 - len(render_prompt(tokenizer, prompt_of(record), None, {})) for record in data.held_out_records]
    assert room[0] < room[2] < 60 < room[1]
    lengths = [len(answer.ids) + answer.ended for answer in found.completions]
    assert all(length <= limit for length, limit in zip(lengths, [room[0], 60, room[2]], strict=True))
    assert len(found.general_nll) > 0
    with pytest.raises(DataError, match=r"held.jsonl:1: a prompt of 1\d\d tokens; the model has positions for 128"):
        measure(model, tokenizer, held_out(tokenizer, [("a" * 120, "b")]), EvaluateConfig(max_new_tokens=60))


OPTIMS = "lora_sft data.path=none.jsonl train.optim="
NOTHING = "data.path=reasoning_gym/chain_sum evaluate.size=0 evaluate.general_text=false"
BEFORE = [
    (5, OPTIMS + "galore_adamw", "need to install `galore_torch`"),
    (5, OPTIMS + "lomo", "need to install `lomo_optim`"),
    (2, OPTIMS + "adamw_9bit", "not known to transformers"),
    (2, "dpo data.path=none.jsonl report_to=[nonesuch]", "nonesuch is not supported"),
    (2, "kto data.path=none.jsonl lr_scheduler_type=cosine_with_min_lr", "min_lr_rate should be set"),
    (2, "ppo lr_scheduler_type=cosine_with_min_lr", "min_lr_rate should be set"),
    (2, "ppo batch_size=7", "Set batch_size=8"),
    (2, "ppo value_model=separate value_init_from=runs/none", "no whole model there"),
    (2, "kto data.path=none.jsonl train.extra.adam_bta2=0.9", "Did you mean train.extra.adam_beta2?"),
    (2, "orpo data.path=none.jsonl train.extra.adam_beta2=high", "expected float or int, found 'high'"),
    (2, "reward_model data.path=none.jsonl train.extra.loss_type=simpo", "RewardConfig has no such argument"),
    (2, "grpo num_generations=7", "per_device_train_batch_size=35"),
    (2, "rloo train.extra.generation_batch_size=9", "RLOOConfig refuses these settings"),
    (2, "dpo data.path=none.jsonl label_smoothing=0.1", "Use loss_type=[robust]"),
    (2, "dpo data.path=none.jsonl train.extra.f_divergence_type=kl", "Known: reverse_kl"),
    (2, "dpo data.path=none.jsonl lora.r=0 model.load_in_4bit=true", "quantised weights cannot be trained"),
    (2, "full_sft data.path=none.jsonl model.dtype=bfloat16", "weights that are trained need float32"),
    (2, "dpo data.path=none.jsonl lora.init_from=runs/none", "no adapter there"),
    (2, "grpo data.path=none.jsonl", "have no scorer of their own"),
    (2, "grpo reward.sources=[none.py:score]", "none.py: no such file"),
    (2, "grpo reward.sources=[none.py]", "names no function"),
    (2, "ppo reward.sources=[./tinny]", "Did you mean tiny?"),
    (2, "ppo reward.sources=[tiny]", "tiny is LlamaForCausalLM: no reward model"),
    (2, "lora_sft data.path=none.jsonl evaluate.reward_model=tiny", "evaluate.reward_model: tiny is LlamaForCausalLM"),
    (2, "lora_sft data.path=none.jsonl evaluate.reward_model=./rm", "evaluate.reward_model: ./rm: no reward model"),
    (2, "lora_sft data.path=none.jsonl evaluate.size=0 evaluate.metrics=[rouge]", "evaluate.size is 0"),
    *((2, f"{recipe} {NOTHING}", "nothing is measured") for recipe in ("ppo", "grpo", "rloo")),
]


@pytest.mark.parametrize(("code", "words", "said"), BEFORE)
def test_what_cannot_be_is_refused_before_rows_and_weights_are_read_and_leaves_no_folder(
    code: int, words: str, said: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    for command in ("check", "run"):
        found = cli(command, *words.split(), "model.name_or_path=tiny")
        assert (found.code, said in found.err) == (code, True), found.err
    assert sorted(path.name for path in home.iterdir()) == ["rows.jsonl", "tiny"]


@pytest.mark.parametrize("task", ["CAUSAL_LM", "torn"])
def test_an_adapter_that_writes_or_is_torn_is_no_reward(task: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    (home / "rm").mkdir()
    text = json.dumps({"peft_type": "LORA", "task_type": task, "base_model_name_or_path": "tiny"})
    (home / "rm" / "adapter_config.json").write_text(text if task != "torn" else text[:20])
    for setting in ("reward.sources=[rm]", "evaluate.reward_model=rm"):
        found = cli("run", "grpo", "model.name_or_path=tiny", setting)
        assert found.code == 2, found.err
        assert ("an adapter that writes text" if task != "torn" else "cannot be read as JSON") in found.err


def test_a_plan_for_another_device_does_not_ask_this_machine_for_packages(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    words = ("check", "lora_sft", "model.name_or_path=tiny", "data.path=rows.jsonl", "--device", "cuda")
    assert cli(*words, "train.optim=lomo").code == 0
    assert cli(*words, "train.extra.adam_bta2=0.9").code == 2


def test_a_tokenizer_whose_pattern_never_ends_is_a_message_and_leaves_no_folder(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    written = json.loads((home / "tiny" / "tokenizer.json").read_text())
    endless = {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False}
    written["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [endless, written["pre_tokenizer"]]}
    (home / "tiny" / "tokenizer.json").write_text(json.dumps(written))
    rows = [json.dumps({"prompt": "a" * 60 + f"!{number}", "completion": "b"}) for number in range(8)]
    (home / "rows.jsonl").write_text("\n".join(rows))
    for command in ("check", "run"):
        said = cli(command, "lora_sft", "model.name_or_path=tiny", "data.path=rows.jsonl")
        assert said.code == 2
        assert "The tokenizer gave up on a text: Onig: Regex search error: retry-limit-in-match over" in said.err
    assert sorted(path.name for path in home.iterdir()) == ["rows.jsonl", "tiny"]


def test_the_losses_are_those_of_trl_s_trainers() -> None:
    from trl import DPOTrainer, GRPOTrainer, KTOTrainer

    for trainer, name in ((DPOTrainer, "dpo"), (KTOTrainer, "labelled_completion"), (GRPOTrainer, "prompt")):
        source = inspect.getsource(trainer)
        found = set(re.findall(r'loss_type == "(\w+)"', source))
        for names in re.findall(r"self\.loss_type in \[([^\]]*)\]", source):
            found |= set(re.findall(r'"(\w+)"', names))
        assert found == set(LOSSES[name])


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}),
        ({"top_k": 20}, {"do_sample": True, "top_k": 20}),
        ({"do_sample": False, "min_p": 0.1}, {"do_sample": True, "min_p": 0.1}),
        ({"temperature": 0.0}, {}),
        ({"length_penalty": 0.8}, {}),
        ({"temperature": 0.6, "early_stopping": True}, {"do_sample": True, "temperature": 0.6}),
        ({"output_scores": True}, {}),
        ({"pad_token_id": -1}, {}),
        ({"num_beams": 4, "length_penalty": 0.8}, {"num_beams": 4, "length_penalty": 0.8}),
    ],
)
def test_a_generation_config_that_could_not_be_saved_is_mended_at_load(
    given: dict[str, object], kept: dict[str, object], tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(given))
    config = GenerationConfig.from_pretrained(tmp_path / "base")
    mend_generation_config(config, "base")
    config.eos_token_id = [7]  # as a run does
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert {key: saved[key] for key in given.keys() | kept if saved.get(key) is not None} == kept


def test_what_cannot_be_mended_is_refused_when_the_model_is_loaded() -> None:
    config = GenerationConfig()
    config.max_new_tokens = -3
    with pytest.raises(SettingsError, match=r"could not be saved with the result: .max_new_tokens. must be greater"):
        mend_generation_config(config, "base")


def test_a_cache_that_cannot_be_written_names_the_setting_that_moves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FINETUNE_KIT_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(embedded, "_source", lambda: tmp_path / "model.gguf")
    with pytest.raises(ResourceError, match="cannot be written: Not a directory") as caught:
        load_tokenizer(ModelConfig())
    assert caught.value.fix == "Name a folder that can: FINETUNE_KIT_CACHE=/path/to/folder"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EROFS])
def test_a_disk_that_fails_under_a_run_is_a_message_and_another_error_stays_itself(number: int, tmp_path: Path) -> None:
    heeded, said = resources.disk_errors, "The result could not be written: "
    with pytest.raises(ResourceError, match=said + os.strerror(number)), heeded(tmp_path, "The result"):
        raise OSError(number, os.strerror(number))
    with pytest.raises(ResourceError, match=f"{said}Permission denied"), heeded(tmp_path, "The result"):
        raise OSError(errno.EACCES, "Permission denied", str(tmp_path / "MANIFEST.json"))
    with pytest.raises(FileNotFoundError), resources.disk_errors(tmp_path, "The result"):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/elsewhere")
