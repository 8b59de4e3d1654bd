"""rl/vllm.py against a stand-in for vLLM that loads what it is given with plain transformers and PEFT."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune_kit.errors import ResourceError, SettingsError
from finetune_kit.rl import vllm
from finetune_kit.rl.rollout import Sampled, sample
from tests.rl.fixtures import parts, settings, trainer, write_home

PROMPTS = [[7, 8, 9], [20], [30, 31, 32, 33]]
ENGINE = """
from types import SimpleNamespace
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

made = []

class SamplingParams(SimpleNamespace):
    pass

class LLM:
    def __init__(self, **given):
        self.given = given
        made.append(self)
        self.requests = []

    def generate(self, prompts, settings, lora_request, use_tqdm):
        self.requests.append((lora_request.number, settings))
        base = AutoModelForCausalLM.from_pretrained(self.given["model"])
        policy = PeftModel.from_pretrained(base, lora_request.path).eval()
        answers = []
        for prompt, wanted in zip(prompts, settings):
            ids, reason = list(prompt["prompt_token_ids"]), "length"
            for _ in range(wanted.max_tokens):  # greedy
                with torch.no_grad():
                    ids.append(int(policy(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] in wanted.stop_token_ids:
                    reason = "stop"
                    break
            new = ids[len(prompt["prompt_token_ids"]) :]
            answers.append(SimpleNamespace(token_ids=new, finish_reason=reason, stop_reason=new[-1]))
        return [SimpleNamespace(outputs=[answer]) for answer in answers]
"""
REQUEST = """
class LoRARequest:
    def __init__(self, name, number, path):
        self.name, self.number, self.path = name, number, path
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_home(tmp_path_factory.mktemp("vllm"))


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "vllm" / "lora").mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").write_text(ENGINE)
    (tmp_path / "vllm" / "lora" / "__init__.py").touch()
    (tmp_path / "vllm" / "lora" / "request.py").write_text(REQUEST)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(vllm, "device", lambda: SimpleNamespace(type="cuda"))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]


def made(home: Path, policy: Any, *words: str, processes: int = 1) -> Any:
    config = settings(home, *words)
    return vllm.sampler(policy, config.model, longest=64, gpu_memory_utilization=0.3, processes=processes)


def test_it_draws_from_the_adapter_as_it_is_at_each_of_2_calls(home: Path, engine: None) -> None:
    policy = parts(settings(home))[0].eval()
    draw = made(home, policy)
    given: dict[str, Any] = {"max_new_tokens": 6, "end_token_ids": [], "seed": 3, "batch_size": 8}
    first = sample(policy, PROMPTS, temperature=1e-5, **given)
    given["end_token_ids"] = [first[0].ids[2], first[1].ids[4]]
    seen = []
    for _ in range(2):
        expected = sample(policy, PROMPTS, temperature=1e-5, **given)
        assert draw(policy, PROMPTS, temperature=0.7, **given) == expected
        seen.append(expected)
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) / 3)
    assert seen[0] != seen[1]
    assert {row.ended for row in seen[0]} == {True, False}
    (llm,) = sys.modules["vllm"].made
    assert [number for number, _ in llm.requests] == [1, 2]
    assert llm.given["max_lora_rank"] == 16
    asked = llm.requests[0][1]
    assert {(row.temperature, row.ignore_eos) for row in asked} == {(0.7, True)}
    assert len({row.seed for row in asked}) == 3


def test_an_end_token_that_vllm_leaves_out_is_put_back() -> None:
    output = SimpleNamespace(token_ids=[5, 6], finish_reason="stop", stop_reason=3)
    assert vllm._sampled(output, [2, 3]) == Sampled([5, 6, 3], True)
    assert vllm._sampled(SimpleNamespace(token_ids=[5], finish_reason="length", stop_reason=None), [2]) == Sampled(
        [5], False
    )


def test_what_vllm_cannot_be_given_is_refused_before_anything_is_loaded(home: Path, engine: None) -> None:
    policy = parts(settings(home))[0]
    whole = parts(settings(home, "lora.r=0"))[0]
    with pytest.raises(SettingsError, match="needs a LoRA policy"):
        made(home, whole, "lora.r=0")
    with pytest.raises(SettingsError, match="one process"):
        made(home, policy, processes=2)


def test_without_a_gpu_or_without_vllm_it_says_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="use_vllm=true needs a GPU; this run is on cpu"):
        trainer(home, "use_vllm=true")
    with pytest.raises(SettingsError, match="no effect without use_vllm"):
        trainer(home, "vllm_gpu_memory_utilization=0.5")
    monkeypatch.setattr(vllm, "device", lambda: SimpleNamespace(type="cuda"))
    with pytest.raises(ResourceError, match="vLLM, which is not installed") as caught:
        trainer(home, "use_vllm=true")
    assert "finetune-kit[vllm]" in caught.value.fix


def test_the_seeds_of_256_rows_in_20_updates_have_none_in_common() -> None:
    updates = [vllm.row_seeds(seed, 256) for seed in range(1, 41, 2)]  # an update's seed is 2 above the one before
    assert len({seed for seeds in updates for seed in seeds}) == 20 * 256
    assert vllm.row_seeds(1, 256) == updates[0]
    assert all(0 <= seed < 2**63 for seeds in updates for seed in seeds)
