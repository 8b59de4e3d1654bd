"""generation.py: batched completions equal those made one by one, and only the given settings act."""

import functools
import logging
import re

import pytest
import torch

from finetune_kit.errors import DataError, ResourceError
from finetune_kit.generation.generate import _Stream, completion_of, generate
from finetune_kit.models.inference import evaluation_mode, in_batches
from tests.fixtures_data import bpe_tokenizer
from tests.fixtures_evaluation import byte_tokenizer, tiny_gpt2, tiny_llama

TOKENIZER = byte_tokenizer()
PROMPTS = [
    TOKENIZER(text)["input_ids"] for text in ("a", "what is 2 + 2?", "hello there", "x" * 40, "", "Zebra", "q r")
]
PROMPTS[4] = [TOKENIZER.eos_token_id] * 3  # a prompt made of the token that is also the padding


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_greedy_in_batches_of_3_equals_one_by_one_in_the_order_of_the_prompts(make):
    model = make()
    batched = generate(model, TOKENIZER, PROMPTS, max_new_tokens=12, end_token_ids=[7, 30], batch_size=3)
    alone = [generate(model, TOKENIZER, [p], max_new_tokens=12, end_token_ids=[7, 30])[0] for p in PROMPTS]
    assert batched == alone
    assert any(not completion.ended for completion in batched)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_left_padding_does_not_change_a_completion(make):
    model = make()
    short = TOKENIZER("hi")["input_ids"]
    alone = generate(model, TOKENIZER, [short], max_new_tokens=10, end_token_ids=[])[0]
    for length in (3, 17, 60):
        beside = generate(model, TOKENIZER, [short, [65] * length], max_new_tokens=10, end_token_ids=[])[0]
        assert beside == alone


def test_ended_is_told_by_the_end_token_even_when_it_is_also_the_padding():
    model = tiny_llama()
    free = generate(model, TOKENIZER, PROMPTS, max_new_tokens=10, end_token_ids=[])
    end = free[0].ids[4]
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end)
    assert tokenizer.pad_token_id == end
    stopped = generate(model, tokenizer, PROMPTS, max_new_tokens=10, end_token_ids=[end])
    for before, after in zip(free, stopped, strict=True):
        expected = before.ids[: before.ids.index(end)] if end in before.ids else before.ids
        assert after.ids == expected
        assert after.ended == (end in before.ids)
    assert stopped[0].ended
    assert not all(completion.ended for completion in stopped)


def test_without_end_tokens_every_completion_has_max_new_tokens_tokens_whatever_the_checkpoint_says():
    model = tiny_llama()
    first = generate(model, TOKENIZER, PROMPTS[:1], max_new_tokens=6, end_token_ids=[])[0].ids
    model.generation_config.eos_token_id = first[0]
    again = generate(model, TOKENIZER, PROMPTS[:1], max_new_tokens=6, end_token_ids=[])[0]
    assert again.ids == first
    assert len(first) == 6
    assert not again.ended


def test_the_checkpoints_own_sampling_settings_do_not_act_and_are_still_there_afterwards():
    model = tiny_llama()
    clean = generate(model, TOKENIZER, PROMPTS, max_new_tokens=12, end_token_ids=[])
    stored = model.generation_config
    stored.do_sample, stored.temperature, stored.repetition_penalty, stored.top_k = True, 3.0, 9.0, 5
    assert generate(model, TOKENIZER, PROMPTS, max_new_tokens=12, end_token_ids=[]) == clean
    assert model.generation_config is stored
    assert stored.repetition_penalty == 9.0


def test_an_adapters_base_keeps_its_generation_settings():
    from peft import LoraConfig, get_peft_model

    base = tiny_llama()
    stored = base.generation_config
    stored.repetition_penalty = 9.0
    plain = generate(base, TOKENIZER, PROMPTS, max_new_tokens=8, end_token_ids=[])
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert generate(model, TOKENIZER, PROMPTS, max_new_tokens=8, end_token_ids=[]) == plain
    assert model.get_base_model().generation_config is stored


def test_the_same_seed_gives_the_same_samples_and_leaves_the_random_state_alone():
    model, settings = tiny_llama(), {"max_new_tokens": 12, "end_token_ids": [], "do_sample": True, "temperature": 1.5}
    torch.manual_seed(5)
    expected_draw = torch.rand(3)
    torch.manual_seed(5)
    one = generate(model, TOKENIZER, PROMPTS, seed=1, **settings)
    assert torch.equal(torch.rand(3), expected_draw)
    assert generate(model, TOKENIZER, PROMPTS, seed=1, **settings) == one
    assert generate(model, TOKENIZER, PROMPTS, seed=2, **settings) != one


def test_top_k_1_samples_are_the_greedy_ones():
    model = tiny_llama()
    greedy = generate(model, TOKENIZER, PROMPTS, max_new_tokens=8, end_token_ids=[])
    assert generate(model, TOKENIZER, PROMPTS, max_new_tokens=8, end_token_ids=[], do_sample=True, top_k=1) == greedy


def test_a_model_in_training_mode_answers_without_dropout_and_goes_back_to_each_modules_mode():
    model = tiny_gpt2()
    expected = generate(model, TOKENIZER, PROMPTS, max_new_tokens=8, end_token_ids=[])
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    assert generate(model, TOKENIZER, PROMPTS, max_new_tokens=8, end_token_ids=[]) == expected
    assert [module.training for module in model.modules()] == modes


def test_evaluation_mode_is_left_even_after_an_error():
    def broken(model):
        with evaluation_mode(model):
            assert not model.training
            assert not torch.is_grad_enabled()
            raise RuntimeError("broken")

    model = tiny_gpt2().train()
    with pytest.raises(RuntimeError, match="broken"):
        broken(model)
    assert model.training
    assert torch.is_grad_enabled()


def test_text_is_the_decoded_ids_and_progress_counts_to_the_number_of_prompts():
    told = []
    completions = generate(
        tiny_llama(), TOKENIZER, PROMPTS, max_new_tokens=5, end_token_ids=[], batch_size=3, progress=told.append
    )
    assert told == [0, 3, 6, 7]
    assert [c.text for c in completions] == [TOKENIZER.decode(c.ids, skip_special_tokens=True) for c in completions]


def test_no_prompts_give_no_completions_and_an_empty_prompt_is_an_error_with_its_number():
    assert generate(tiny_llama(), TOKENIZER, [], max_new_tokens=4, end_token_ids=[]) == []
    with pytest.raises(DataError, match="Prompt 2 of 2 has no token"):
        generate(tiny_llama(), TOKENIZER, [[1], []], max_new_tokens=4, end_token_ids=[])


def test_out_of_memory_halves_this_batch_and_the_following_ones_and_says_so(caplog):
    sizes, rows = [], []

    def run(batch):
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        rows.extend(batch)

    with caplog.at_level(logging.WARNING):
        in_batches([list(range(8)), list(range(8, 16)), [16]], run, "generation")
    assert rows == list(range(17))
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2, 1]
    assert [record.message for record in caplog.records] == [
        "Out of memory in generation with 8 rows in a batch: continuing with 4.",
        "Out of memory in generation with 4 rows in a batch: continuing with 2.",
    ]


def test_one_row_that_does_not_fit_is_a_resource_error_and_any_other_error_passes_through():
    def cpu_allocator(batch):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    def bug(batch):
        raise RuntimeError("shape mismatch")

    with pytest.raises(ResourceError, match="one row in the batch"):
        in_batches([[0, 1]], cpu_allocator, "generation")
    with pytest.raises(RuntimeError, match="shape mismatch"):
        in_batches([[0, 1]], bug, "generation")


def one_by_one(model, **settings):
    return [generate(model, TOKENIZER, [prompt], **settings)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_repetition_penalty_of_1_5_in_batches_of_3_equals_one_by_one_and_is_the_one_of_transformers(make):
    model = make()
    settings = {"max_new_tokens": 12, "end_token_ids": [7, 30], "repetition_penalty": 1.5}
    alone = one_by_one(model, **settings)
    assert generate(model, TOKENIZER, PROMPTS, batch_size=3, **settings) == alone
    assert alone != one_by_one(model, **{**settings, "repetition_penalty": 1.0})
    plain = model.generate(
        torch.tensor(PROMPTS[1:2]), max_new_tokens=12, do_sample=False, repetition_penalty=1.5, eos_token_id=None
    )[0, len(PROMPTS[1]) :].tolist()
    assert alone[1].ids == plain[: len(alone[1].ids)]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_repetition_penalty_of_9_does_not_count_the_padding_though_it_is_the_token_that_ends_each_answer(make):
    model = make()
    settings = {"max_new_tokens": 6, "repetition_penalty": 9.0}
    for prompt in (PROMPTS[0], PROMPTS[5], PROMPTS[6]):
        free = generate(model, TOKENIZER, [prompt], end_token_ids=[], **settings)[0].ids
        end = next(token for token in free[1:] if token not in prompt)
        tokenizer = byte_tokenizer()
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end)
        pair = generate(model, tokenizer, [prompt, PROMPTS[3]], end_token_ids=[end], **settings)
        assert pair[0].ids == free[: free.index(end)]
        assert pair[0].ended


def stops_in(model):
    """Two strings that answers have after their second letter: two letters of one answer, and one of another."""
    free = generate(model, TOKENIZER, PROMPTS, max_new_tokens=24, end_token_ids=[])
    whole = [re.findall(r"(?<=..)[ -~]{2}", completion.text, re.DOTALL) for completion in free]
    found = [strings[0] for strings in whole if strings]
    return free, (found[0], found[-1][:1])


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_stop_strings_cut_the_text_before_them_and_in_batches_of_3_as_one_by_one(make):
    model = make()
    free, stop = stops_in(model)
    stopped = generate(model, TOKENIZER, PROMPTS, max_new_tokens=24, end_token_ids=[], batch_size=3, stop=stop)
    assert stopped == one_by_one(model, max_new_tokens=24, end_token_ids=[], stop=stop)
    for before, after in zip(free, stopped, strict=True):
        found = [before.text.index(string) for string in stop if string in before.text]
        assert after.text == before.text[: min(found, default=len(before.text))]
        assert after.ended == bool(found)
        assert after.ids == before.ids[: len(after.ids)]
    assert sum(completion.ended for completion in stopped) >= 2


def test_generation_stops_at_a_stop_string_instead_of_going_on_to_500_tokens():
    model = tiny_llama()
    _, stop = stops_in(model)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    completion = generate(model, TOKENIZER, PROMPTS[:1], max_new_tokens=500, end_token_ids=[], stop=stop[:1])[0]
    assert len(calls) == len(completion.ids) <= 24
    assert completion.ended


def test_a_stop_string_that_begins_and_ends_inside_tokens_is_found_and_the_tokens_after_it_do_not_count():
    tokenizer = bpe_tokenizer()
    ids = tokenizer("the answer is forty two, and the question was what it is.")["input_ids"]
    assert len(ids) < 40  # tokens of several letters
    completion = completion_of(tokenizer, ids, end_token_ids=[], stop=["ty tw", "forty two, and"])
    assert completion.text == "the answer is for"
    assert completion.ended
    assert "ty tw" in tokenizer.decode(completion.ids)
    assert "ty tw" not in tokenizer.decode(completion.ids[:-1])


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 1.5, "seed": 4}])
def test_the_pieces_of_a_stream_are_the_text_and_no_piece_is_taken_back(sampling, stopped):
    model = tiny_llama()
    _, stop = stops_in(model)
    settings = {"max_new_tokens": 24, "end_token_ids": [7, 30], "stop": stop if stopped else (), **sampling}
    for prompt in PROMPTS[:4]:
        pieces = []
        streamed = generate(model, TOKENIZER, [prompt], stream=pieces.append, **settings)[0]
        assert streamed == generate(model, TOKENIZER, [prompt], **settings)[0]
        assert "".join(pieces) == streamed.text
        assert all(pieces)


def test_a_stream_holds_back_half_a_character_and_what_may_become_a_stop_string():
    said, told = "für 5 € <end>", []
    completed = functools.partial(completion_of, TOKENIZER, end_token_ids=[], stop=["<end>"])
    stream = _Stream(completed, ["<end>"], told.append)
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in TOKENIZER(said)["input_ids"]:
        stream.put(torch.tensor([token]))
    assert told == ["f", "ü", "r", " ", "5", " ", "€", " "]
    stream.end()
    assert "".join(told) == "für 5 € "


def test_only_one_prompt_can_be_streamed():
    with pytest.raises(ValueError, match="one prompt"):
        generate(tiny_llama(), TOKENIZER, PROMPTS, max_new_tokens=2, end_token_ids=[], stream=print)


def test_min_p_1_samples_are_the_greedy_ones_and_min_p_0_ones_are_not():
    model = tiny_llama()
    settings = {"max_new_tokens": 8, "end_token_ids": []}
    greedy = generate(model, TOKENIZER, PROMPTS, **settings)
    assert generate(model, TOKENIZER, PROMPTS, do_sample=True, min_p=1.0, seed=0, **settings) == greedy
    assert generate(model, TOKENIZER, PROMPTS, do_sample=True, min_p=0.0, seed=0, **settings) != greedy


def test_with_every_setting_at_once_the_same_seed_gives_the_same_text_twice():
    model = tiny_llama()
    settings = {"max_new_tokens": 20, "end_token_ids": [7], "do_sample": True, "temperature": 1.3, "top_p": 0.95}
    settings |= {"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.2, "stop": ["e", "\n"], "batch_size": 3}
    one = generate(model, TOKENIZER, PROMPTS, seed=11, **settings)
    assert generate(model, TOKENIZER, PROMPTS, seed=11, **settings) == one
    assert generate(model, TOKENIZER, PROMPTS, seed=12, **settings) != one
