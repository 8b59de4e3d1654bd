"""rl/rollout.py: samples are the policy's own, and its numbers are those of each row alone, without a cache."""

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_kit.generation.cache import common_beginning
from finetune_kit.generation.generate import generate
from finetune_kit.models.completion_rows import make_rows, states
from finetune_kit.models.second_adapter import adapter
from finetune_kit.packing import forward
from finetune_kit.rl.rollout import Reference, sample, token_stats
from finetune_kit.rl.value import build_value, value_parameters
from tests.rl.fixtures import parts, settings, trainer, write_home

PAD, END = 0, 3  # of the tiny tokenizer: <|pad|> and <|im_end|>
# rows of different lengths, with the pad and the end token inside them
PROMPTS = [[7, 8, 9], [END, 10, PAD, 11, 12, 13, END, PAD], [20], [PAD, PAD, 30, 31]]
COMPLETIONS = [[40, END], [41, 42, 43, PAD, 44], [END], [45, 46, 47]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_home(tmp_path_factory.mktemp("rollout"))


def policy_of(home: Path, *words: str) -> Any:
    return parts(settings(home, *words))[0].eval()


def draw(policy: Any, prompts: list[list[int]], **changed: Any) -> list[Any]:
    given = {"max_new_tokens": 12, "end_token_ids": [END], "temperature": 1.0, "seed": 0, "batch_size": 32}
    return sample(policy, prompts, **{**given, **changed})


def alone(policy: Any, prompt: list[int], completion: list[int], temperature: float) -> torch.Tensor:
    """Log-probabilities of one row by the plain forward: no batch, no padding, no cache, no cut head."""
    with torch.no_grad():
        logits = policy(input_ids=torch.tensor([prompt + completion])).logits[0].float() / temperature
    logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return logprobs.gather(-1, torch.tensor(completion)[:, None])[:, 0]


def test_near_temperature_0_the_samples_are_generates_greedy_answers_with_their_end_tokens(home: Path) -> None:
    policy, tokenizer, _ = parts(settings(home))
    prompts = [[5 + n, *range(30, 30 + n)] for n in range(12)]
    greedy = generate(policy, tokenizer, prompts, max_new_tokens=12, end_token_ids=[])
    ends = [completion.ids[n % 9] for n, completion in enumerate(greedy)]  # so that rows end at different places
    expected = generate(policy, tokenizer, prompts, max_new_tokens=12, end_token_ids=ends)
    found = draw(policy, prompts, end_token_ids=ends, temperature=1e-5)
    assert [row.ended for row in found] == [row.ended for row in expected]
    assert sum(row.ended for row in found) >= 6
    for got, want in zip(found, expected, strict=True):
        assert (got.ids[:-1] if got.ended else got.ids) == want.ids
        assert (got.ids[-1] in ends) == got.ended


def test_samples_are_drawn_with_the_chances_of_softmax_at_the_temperature(home: Path) -> None:
    policy = policy_of(home)
    with torch.no_grad():
        chances = (policy(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1] / 0.5).softmax(-1)
    drawn = draw(policy, [PROMPTS[0]] * 4000, max_new_tokens=1, temperature=0.5, batch_size=4000)
    counts = torch.bincount(torch.tensor([row.ids[0] for row in drawn]), minlength=len(chances)) / 4000
    likely = chances.topk(5).indices
    assert torch.allclose(counts[likely], chances[likely], atol=4 * (0.25 / 4000) ** 0.5)


def test_samples_follow_from_the_seed_alone_and_leave_the_random_state(home: Path) -> None:
    policy = policy_of(home)
    state = torch.get_rng_state()
    first, again, other = (draw(policy, PROMPTS, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert torch.equal(state, torch.get_rng_state())


def test_what_16_prompts_begin_with_goes_through_the_model_once_and_the_samples_stay_the_same(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of(home)
    prompts = [[*range(40, 70), *range(100, 101 + n)] for n in range(16)]
    fed: list[int] = []
    hook = policy.register_forward_pre_hook(
        lambda m, a, kwargs: fed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    shared = draw(policy, prompts)
    assert fed[:2] == [30, 16 * 16]  # 30 tokens that all have, then 1 to 16 of their own, padded to 16
    fed.clear()
    monkeypatch.setattr("finetune_kit.generation.cache.common_beginning", lambda policy, prompts: 0)
    assert draw(policy, prompts) == shared
    assert fed[0] == 16 * 46
    hook.remove()


def test_a_model_with_a_sliding_window_gets_each_prompt_whole(home: Path) -> None:
    policy = policy_of(home)
    same = [[*range(30), 40], [*range(30), 41]]
    assert common_beginning(policy, same) == 30
    assert common_beginning(policy, [same[0], same[0]]) == 30  # the last token is each row's own
    assert common_beginning(policy, [same[0]]) == 0
    assert common_beginning(policy, [[1, 2, 3], [1, 2, 4]]) == 0
    policy.config.sliding_window = 8
    assert common_beginning(policy, same) == 0


def test_rows_that_have_ended_leave_the_batch(home: Path) -> None:
    policy = policy_of(home)
    sizes: list[int] = []
    hook = policy.register_forward_pre_hook(
        lambda m, a, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    drawn = draw(policy, [[5 + n] for n in range(16)], end_token_ids=list(range(0, 261, 3)), max_new_tokens=12)
    hook.remove()
    assert sizes[0] == 16
    assert sizes[-1] < 16
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) < 16 * max(len(row.ids) for row in drawn)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_numbers_in_a_batch_are_those_of_each_row_alone_with_pad_and_end_tokens_inside_prompts(
    home: Path, pack: bool, temperature: float
) -> None:
    policy = policy_of(home)
    expected = [alone(policy, *row, temperature) for row in zip(PROMPTS, COMPLETIONS, strict=True)]
    if pack:
        assert forward.enable(policy) == ""
    rows = make_rows(PROMPTS, COMPLETIONS, 6, "cpu")
    with torch.no_grad():
        seen = token_stats(policy, rows, temperature, entropy=True)
    assert seen.logprobs.shape == (4, 6)
    assert seen.entropy is not None
    for row, want in enumerate(expected):
        assert torch.allclose(seen.logprobs[row, : len(want)], want, atol=1e-5)
        assert not seen.logprobs[row, len(want) :].any()
        assert (seen.entropy[row, : len(want)] > 0).all()


def test_the_mask_counts_tokens_whatever_their_ids(home: Path) -> None:
    rows = make_rows(PROMPTS, COMPLETIONS, 5, "cpu")
    assert rows.attention_mask.sum(1).tolist() == [5, 13, 2, 7]
    assert rows.mask.sum(1).tolist() == [2, 5, 1, 3]
    assert rows.before.tolist() == [2, 3, 20, 21, 22, 23, 24, 26, 42, 43, 44]  # 13 columns a row
    assert rows.places.tolist() == rows.mask.flatten().nonzero()[:, 0].tolist()
    assert rows.tokens.tolist() == [token for completion in COMPLETIONS for token in completion]
    assert rows.spread(torch.arange(1.0, 12)).tolist()[0] == [1, 2, 0, 0, 0]


def test_the_head_runs_on_the_11_completion_tokens_and_on_none_for_a_value(home: Path) -> None:
    policy = policy_of(home)
    seen: list[int] = []
    head = policy.get_base_model().get_output_embeddings()
    hook = head.register_forward_hook(lambda module, args, output: seen.append(output.shape[-2]))
    rows = make_rows(PROMPTS, COMPLETIONS, 5, "cpu")
    logits, hidden = states(policy, rows)
    assert states(policy, rows, head=False)[0].shape[0] == 0
    hook.remove()
    assert seen == [11, 0]
    assert logits.shape[0] == hidden.shape[0] == 11


@pytest.mark.parametrize("words", [(), ("lora.r=0",)], ids=["lora", "full"])
def test_the_reference_is_the_start_to_the_bit_whatever_the_policy_has_become(home: Path, words: Any) -> None:
    policy = policy_of(home, *words)
    reference, rows = Reference(policy), make_rows(PROMPTS, COMPLETIONS, 5, "cpu")
    assert reference.is_adapter_off == (not words)
    with torch.no_grad():
        start = token_stats(policy, rows, 1.0).logprobs
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
        moved = token_stats(policy, rows, 1.0).logprobs
        with reference():
            assert torch.equal(token_stats(policy, rows, 1.0).logprobs, start)
        assert torch.equal(token_stats(policy, rows, 1.0).logprobs, moved)
    assert not torch.allclose(moved, start)


def test_an_adapter_that_goes_on_from_a_run_is_its_own_reference(home: Path, tmp_path: Path) -> None:
    first = policy_of(home)
    with torch.no_grad():
        for parameter in first.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    first.save_pretrained(tmp_path / "sft")
    policy = policy_of(home, f"lora.init_from={tmp_path / 'sft'}")
    reference, rows = Reference(policy), make_rows(PROMPTS, COMPLETIONS, 5, "cpu")
    assert not reference.is_adapter_off
    with torch.no_grad(), reference():
        inside = token_stats(policy, rows, 1.0).logprobs
    with torch.no_grad():
        assert torch.equal(inside, token_stats(policy, rows, 1.0).logprobs)
        with adapter(policy, None):
            assert not torch.allclose(inside, token_stats(policy, rows, 1.0).logprobs)


def test_a_values_own_adapter_follows_from_the_seed_and_has_no_dropout_in_a_trainer(home: Path) -> None:
    made = [trainer(home, "value_model=adapter", "lora.lora_dropout=0.5", f"seed={seed}") for seed in (1, 1, 2)]
    ups = [torch.cat([p.flatten() for n, p in one.trained.items() if "lora_A.value_adapter" in n]) for one in made]
    assert torch.equal(ups[0], ups[1])
    assert not torch.equal(ups[0], ups[2])
    assert not any(module.training for module in made[0].model.modules())


@pytest.mark.parametrize("kind", ["shared", "adapter", "separate"])
def test_each_kind_of_value_starts_at_0_and_gets_a_gradient_where_it_should(home: Path, kind: str) -> None:
    config = settings(home)
    policy = parts(config)[0].eval()
    own = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    value = build_value(kind, policy, config.model)
    rows = make_rows(PROMPTS, COMPLETIONS, 5, "cpu")
    seen = token_stats(policy, rows, 1.0, value)
    assert seen.values is not None
    assert not seen.values.any()
    torch.nn.init.ones_(value.head.weight)
    again = token_stats(policy, rows, 1.0, value)
    assert again.values is not None
    assert torch.equal(again.logprobs, seen.logprobs)
    again.values.square().sum().backward()
    moved = {
        name for name, parameter in policy.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    named = value_parameters(value, policy)
    assert value.head.weight.grad is not None
    assert bool(moved & own) == (kind == "shared")
    assert bool(moved & named.keys()) == (kind == "adapter")
    trunk = [parameter for name, parameter in named.items() if ".trunk." in name]
    assert bool(trunk) == (kind == "separate")
    assert all(parameter.grad is not None for parameter in trunk)


def test_policy_and_value_adapters_stay_trained_after_the_reference_was_looked_at(home: Path) -> None:
    config = settings(home)
    policy = parts(config)[0].eval()
    reference, value = Reference(policy), build_value("adapter", policy, config.model)
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if ".value_adapter." in name}
    with torch.no_grad(), reference():
        token_stats(policy, make_rows(PROMPTS, COMPLETIONS, 5, "cpu"), 1.0)
    token_stats(policy, make_rows(PROMPTS, COMPLETIONS, 5, "cpu"), 1.0, value)
    assert {name for name, parameter in policy.named_parameters() if parameter.requires_grad} == trained
    assert policy.active_adapter == "default"


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "gemma3_text"])
def test_other_architectures_sample_and_are_looked_at_alike(kind: str) -> None:
    """GPT-2 has absolute positions and Conv1D layers, Qwen 3 normed queries, Gemma 3 sliding windows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 60}
    more = {} if kind == "gpt2" else {"num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 48}
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **sizes, **more, pad_token_id=0, eos_token_id=3, bos_token_id=None)
    ).eval()
    with torch.no_grad():
        policy.get_input_embeddings().weight.mul_(4)
    drawn = draw(policy, PROMPTS, temperature=1e-5)
    for prompt, row in zip(PROMPTS, drawn, strict=True):
        ids = list(prompt)
        for token in row.ids:
            with torch.no_grad():
                assert token == int(policy(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)
    expected = [alone(policy, *row, 0.7) for row in zip(PROMPTS, COMPLETIONS, strict=True)]
    forward.enable(policy)
    with torch.no_grad():
        found = token_stats(policy, make_rows(PROMPTS, COMPLETIONS, 5, "cpu"), 0.7).logprobs
    for row, want in enumerate(expected):
        assert torch.allclose(found[row, : len(want)], want, atol=1e-5)


@pytest.mark.parametrize("start", ["fresh adapter", "adapter of a run", "full"])
def test_the_kl_of_a_moved_policy_under_bfloat16_autocast_is_float32s_within_5_percent(
    home: Path, tmp_path: Path, start: str
) -> None:
    words: tuple[str, ...] = ("lora.r=0",) if start == "full" else ()
    if start == "adapter of a run":
        first = policy_of(home)
        with torch.no_grad():
            for parameter in first.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.02)
        first.save_pretrained(tmp_path / "sft")
        words = (f"lora.init_from={tmp_path / 'sft'}",)
    policy = policy_of(home, *words)
    for module in policy.modules():  # the product in one pass is the CPU's: a GPU has PEFT's own, two linear layers
        if hasattr(module, "lora_variant"):
            module.lora_variant.clear()
    reference, value = Reference(policy), build_value("shared", policy, settings(home).model)
    assert reference.is_adapter_off == (start == "fresh adapter")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    rows = make_rows(PROMPTS * 4, [[*range(40 + row, 52 + row)] for row in range(16)], 12, "cpu")
    kl = []
    for mixed in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            ours = token_stats(policy, rows, 1.0, value).logprobs
            with reference():
                theirs = token_stats(policy, rows, 1.0).logprobs
            assert torch.equal(token_stats(policy, rows, 1.0).logprobs, ours)  # and the policy is itself again
        kl.append(float((ours - theirs).abs().sum()))
    assert kl[0] > 10
    assert kl[1] == pytest.approx(kl[0], rel=0.05)
