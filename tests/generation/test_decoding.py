"""decoding.py: a cache of fixed size gives what a growing one gives, and is taken where it is proven and faster.

What records a step on a CPU is the step itself: everything but the CUDA graph is what a GPU runs.
"""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_kit.errors import NumericsError
from finetune_kit.generation import decoding
from finetune_kit.generation.cache import Growing, begin, can_leave, pick, select
from finetune_kit.generation.decoding import Choice, Fixed, fastest, prove
from finetune_kit.generation.generate import generate
from finetune_kit.rl import rollout
from finetune_kit.rl.math import entropy_from_logits
from tests.fixtures_evaluation import byte_tokenizer, tiny_gpt2, tiny_llama

TOKENIZER = byte_tokenizer()
PROMPTS = [TOKENIZER(text)["input_ids"] for text in ("a", "what is 2 + 2?", "hello there", "x" * 40, "Zebra", "q r")]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    decoding._chosen.clear()
    yield
    decoding._chosen.clear()


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A CPU that records steps, whose recorded step is always the faster one; counts the runs of recorded steps."""
    runs: list[int] = []

    def capture(run: Any) -> Any:
        run()  # as for a graph, whose libraries make themselves ready
        run()

        def replay() -> None:
            runs.append(1)
            run()

        return replay

    def seconds_of(run: Any, device: torch.device) -> float:
        before = len(runs)
        run()
        return 0.001 if len(runs) > before else 0.025

    monkeypatch.setattr(decoding, "capturing", lambda device: capture)
    monkeypatch.setattr(decoding, "seconds_of", seconds_of)
    return runs


def some_model(kind: str, **more: Any) -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 300}
    if kind != "gpt2":
        sizes |= {"num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 48}
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "eos_token_id": 3, "bos_token_id": None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **ids, **more)).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(4)
    return model


def started(model: Any, prompts: list[list[int]]) -> Growing:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        return begin(model, ids, mask)


def adapted(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    policy = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)
    return policy


def test_pick_is_multinomial_to_the_bit() -> None:
    chances = torch.rand(64, 5000).softmax(-1)
    one, other = (torch.Generator().manual_seed(3) for _ in range(2))
    for _ in range(3):
        assert torch.equal(pick(chances, one), torch.multinomial(chances, 1, generator=other))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "gemma3_text", "mistral", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fixed_cache_gives_a_growing_ones_logits_for_left_padded_rows(
    recording: list[int], kind: str, dtype: torch.dtype
) -> None:
    model = some_model(kind).to(dtype)
    plain, fixed = started(model, PROMPTS), Fixed(started(model, PROMPTS), 20, decoding.capturing(model.device))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for step in range(20):
            tokens = torch.randint(0, 300, (6, 1), generator=generator)
            plain.step(tokens)
            fixed.step(tokens)
            difference, rounding = decoding.apart(plain.logits, fixed.logits, dtype)
            assert difference <= rounding, step
            if dtype == torch.float32:
                assert difference < 1e-4
    assert len(recording) == 20


def test_rows_leave_a_fixed_cache_by_halves_and_the_others_go_on_as_before(recording: list[int]) -> None:
    model = some_model("qwen3")
    plain, fixed = started(model, PROMPTS), Fixed(started(model, PROMPTS), 48, decoding.capturing(model.device))  # type: ignore[arg-type]
    with torch.no_grad():
        for rows in ([0, 1, 2, 3], [1, 3], [0]):
            assert plain.keep(rows) or len(rows) == 4
            left = fixed.keep(rows)
            assert left == (2 * len(rows) <= 6)
            if not left:
                plain = started(model, PROMPTS)
            tokens = torch.full((len(fixed.logits), 1), 9)
            plain.step(tokens)
            fixed.step(tokens)
            assert torch.allclose(plain.logits, fixed.logits, atol=1e-5)
    assert not fixed.keep([0])  # all of them


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.3},
        {"stop": ["e", "\n"]},
        {"do_sample": True, "seed": 3, "temperature": 1.5, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
        {"do_sample": True, "seed": 3, "stop": ["a"], "repetition_penalty": 0.8},
    ],
    ids=["greedy", "penalty", "stop", "sampled", "sampled with all"],
)
def test_answers_are_those_of_transformers_own_loop_under_every_setting(
    recording: list[int], monkeypatch: pytest.MonkeyPatch, make: Any, settings: Any
) -> None:
    model = make()
    given = {"max_new_tokens": 24, "end_token_ids": list(range(0, 258, 12)), "batch_size": 4, **settings}
    found = generate(model, TOKENIZER, PROMPTS, **given)
    assert recording
    monkeypatch.setattr(decoding, "capturing", lambda device: None)
    assert generate(model, TOKENIZER, PROMPTS, **given) == found
    assert len({len(completion.ids) for completion in found}) > 1


def test_a_stream_tells_the_text_that_it_told_before(recording: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    told: tuple[list[str], list[str]] = ([], [])
    given: dict[str, Any] = {"max_new_tokens": 24, "end_token_ids": [7]}
    one = generate(model, TOKENIZER, PROMPTS[1:2], stream=told[0].append, **given)
    assert recording
    monkeypatch.setattr(decoding, "capturing", lambda device: None)
    assert generate(model, TOKENIZER, PROMPTS[1:2], stream=told[1].append, **given) == one
    assert told[0] == told[1] != []


def test_an_adapter_acts_in_a_recorded_step_and_where_it_is_off_does_not(
    recording: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_llama()
    given: dict[str, Any] = {"max_new_tokens": 20, "end_token_ids": []}
    plain = generate(base, TOKENIZER, PROMPTS, **given)
    policy = adapted(base)
    with policy.disable_adapter():
        assert generate(policy, TOKENIZER, PROMPTS, **given) == plain
    adapted_answers = generate(policy, TOKENIZER, PROMPTS, **given)
    assert adapted_answers != plain
    assert recording
    monkeypatch.setattr(decoding, "capturing", lambda device: None)
    assert generate(policy, TOKENIZER, PROMPTS, **given) == adapted_answers


def test_the_ends_are_looked_for_every_16_tokens_and_what_is_drawn_after_one_is_left_out(
    recording: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    given: dict[str, Any] = {"max_new_tokens": 40, "end_token_ids": list(range(0, 250, 2))}
    found = generate(model, TOKENIZER, PROMPTS, **given)
    assert max(len(completion.ids) for completion in found) < 15
    recording.clear()
    monkeypatch.setattr(decoding, "looks_every", lambda device: 16)
    assert generate(model, TOKENIZER, PROMPTS, **given) == found
    assert len(recording) == 15  # 16 tokens: the first came out of the prompts


def test_the_choice_is_made_once_said_once_and_names_both_times(
    recording: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama()
    for _ in range(2):
        generate(model, TOKENIZER, PROMPTS, max_new_tokens=20, end_token_ids=[], batch_size=2)
    said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1
    assert said[0].startswith("sampling: one CUDA graph a token: 1.0 ms for 2 rows against 25.0 ms; log-probabilities")


def test_a_graph_that_is_slower_or_wrong_or_cannot_be_recorded_is_not_taken_and_the_reason_is_said(
    recording: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = some_model("llama")
    begun = started(model, PROMPTS)
    capture = decoding.capturing(model.device)
    assert capture is not None
    with torch.no_grad():
        assert prove(begun, 32, capture).graph

        def waits(run: Any) -> Any:
            raise RuntimeError("called a synchronizing CUDA operation\nmore")

        assert prove(begun, 32, waits) == Choice(False, "no graph: RuntimeError called a synchronizing CUDA operation")
        with pytest.raises(RuntimeError, match="out of memory"):
            prove(begun, 32, lambda run: (_ for _ in ()).throw(RuntimeError("CUDA out of memory")))
        wrong = prove(begun, 32, lambda run: lambda: None)  # a step that does not continue
        assert not wrong.graph
        assert "log-probabilities differ by" in wrong.why
        monkeypatch.setattr(decoding, "seconds_of", lambda run, device: run() or 0.02)
        assert prove(begun, 32, capture) == Choice(False, "a graph takes 20.0 ms for 6 rows against 20.0 ms")
    assert torch.equal(begun.logits, started(model, PROMPTS).logits)  # the batch is left as it was


def test_models_and_caches_that_have_no_fixed_form_go_token_by_token_by_name_of_the_reason(
    recording: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    windowed = some_model("gemma3_text", sliding_window=16)
    long = started(windowed, [list(range(20))])
    assert fastest(long, 20) is long
    short = started(windowed, [[5, 6, 7]])
    assert fastest(short, 8) is short  # too few tokens to pay
    flash, attending = some_model("llama"), started(some_model("llama"), PROMPTS)
    attending.model.config._attn_implementation = "flash_attention_2"
    assert fastest(attending, 20) is attending
    dropping = started(tiny_gpt2(), PROMPTS)
    dropping.model.train()
    assert fastest(dropping, 20) is dropping
    assert not isinstance(fastest(started(flash, PROMPTS), 20), Growing)
    said = " ".join(record.message for record in caplog.records)
    assert "a window of 16 tokens is shorter than the rows" in said
    assert "attention by flash_attention_2 waits for the GPU" in said
    assert "dropout is on" in said
    assert not recording or said.count("token by token") == 3


HYBRIDS = {
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2,
                   "linear_num_key_heads": 1, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 0},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 1,
                  "mamba_n_groups": 1},
}  # fmt: skip


@pytest.mark.parametrize("kind", HYBRIDS)
def test_rows_leave_a_hybrid_models_cache_with_states_and_keys_alike(recording: list[int], kind: str) -> None:
    model = some_model(kind, **HYBRIDS[kind])
    prompts = [[*range(5 + row, 15 + row)] for row in range(8)]
    whole, some = started(model, prompts), started(model, prompts)
    assert fastest(some, 20) is some
    assert can_leave(some.cache)
    rows = [1, 4, 6]
    assert some.keep(rows)
    with torch.no_grad():
        for token in (20, 30, 40):
            whole.step(torch.full((8, 1), token))
            some.step(torch.full((3, 1), token))
            assert torch.allclose(some.logits, whole.logits[rows], atol=1e-5)


def test_rows_stay_where_a_layer_of_the_cache_lets_none_go() -> None:
    begun = started(some_model("llama"), PROMPTS)
    begun.cache.layers[1] = object()
    assert not can_leave(begun.cache)
    assert not begun.keep([0])
    assert len(begun.mask) == 6
    begun.cache = object()
    assert not begun.keep([0])


@pytest.mark.parametrize("every", [1, 16])
def test_ppos_rollouts_are_the_plain_ways_by_the_same_seed(
    recording: list[int], monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    policy = some_model("qwen3")
    prompts = [[*range(40, 60), *range(100, 101 + row)] for row in range(8)]
    given: dict[str, Any] = {"max_new_tokens": 40, "temperature": 1.0, "batch_size": 8}

    def drawn(ends: list[int], seed: int) -> list[Any]:
        return rollout.sample(policy, prompts, end_token_ids=ends, seed=seed, **given)

    found = drawn([], 1)
    assert len(recording) == 39 + 8  # the proof's
    monkeypatch.setattr(decoding, "capturing", lambda device: None)
    assert drawn([], 1) == found
    plain = drawn(list(range(0, 300, 12)), 2)
    monkeypatch.undo()
    monkeypatch.setattr(decoding, "looks_every", lambda device: every)
    monkeypatch.setattr(Growing, "keep", lambda self, rows: False)
    late = drawn(list(range(0, 300, 12)), 2)
    assert [row.ended for row in late].count(True) >= 4
    assert all(row.ids[-1] % 12 == 0 for row in late if row.ended)
    assert not any(token % 12 == 0 for row in late for token in row.ids[:-1])
    shortest = min(len(row.ids) for row in plain)
    assert [row.ids[:shortest] for row in plain] == [row.ids[:shortest] for row in late]


def test_weights_that_are_not_finite_stop_a_rollout_that_looks_every_16_tokens(
    recording: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = some_model("llama")
    with torch.no_grad():
        policy.get_output_embeddings().weight[7] = torch.nan
    monkeypatch.setattr(decoding, "looks_every", lambda device: 16)
    with pytest.raises(NumericsError, match="logits are not finite"):
        rollout.sample(policy, PROMPTS, max_new_tokens=12, end_token_ids=[], temperature=1.0, seed=0, batch_size=8)


def test_words_that_a_model_never_writes_are_no_fault_of_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = some_model("llama")
    head = policy.get_output_embeddings()
    head.register_forward_hook(lambda module, given, out: out.index_fill(-1, torch.arange(7, 200), -torch.inf))
    drawn = rollout.sample(policy, PROMPTS, max_new_tokens=6, end_token_ids=[], temperature=0.7, seed=0, batch_size=8)
    assert not {token for row in drawn for token in row.ids} & set(range(7, 200))
    held = head(torch.randn(3, head.in_features)).detach().requires_grad_()
    found = entropy_from_logits(held)
    found.sum().backward()
    assert found.detach() == pytest.approx(torch.distributions.Categorical(logits=held.detach()).entropy(), abs=1e-5)
    assert held.grad is not None
    assert held.grad.isfinite().all()


def test_select_takes_rows_in_their_order() -> None:
    begun = started(some_model("llama"), PROMPTS)
    keys = begun.cache.layers[0].keys.clone()
    select(begun.cache, torch.tensor([4, 1]))
    assert torch.equal(begun.cache.layers[0].keys, keys[[4, 1]])
