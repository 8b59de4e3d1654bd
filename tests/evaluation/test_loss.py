"""evaluation/loss.py: sums over tokens, the same for any batch size, equal to a computation by hand."""

import math

import pytest
import torch

from finetune_kit.errors import NumericsError
from finetune_kit.evaluation import loss
from finetune_kit.evaluation.loss import general_rows, row_losses
from finetune_kit.packing import forward
from tests.fixtures_evaluation import byte_tokenizer, held_out, tiny_gpt2, tiny_llama

TOKENIZER = byte_tokenizer()
PAIRS = [("question " * (index % 5), "answer " * (index * 3 % 7 + 1)) for index in range(11)]
ROWS = [(row["input_ids"], row["labels"]) for row in held_out(TOKENIZER, PAIRS).held_out]
WHERE = [f"held.jsonl:{index + 1}" for index in range(len(ROWS))]


def by_hand(model, input_ids, labels):
    """Full logits of one row alone, torch's own cross entropy over the shifted labels."""
    with torch.no_grad():
        logits = model(torch.tensor([input_ids])).logits[0, :-1].double()
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum"))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_rows_equal_the_cross_entropy_computed_by_hand_and_the_batch_size_does_not_matter(make):
    model = make()
    expected = [by_hand(model, *row) for row in ROWS]
    for batch_size in (1, 7, 64):
        nll, tokens = row_losses(model, ROWS, WHERE, batch_size)
        assert nll == pytest.approx(expected, rel=1e-5)
        assert tokens == [sum(label != -100 for label in labels) for _, labels in ROWS]


def test_the_limit_on_logits_splits_batches_without_changing_a_loss(monkeypatch):
    model = tiny_llama()
    expected, _ = row_losses(model, ROWS, WHERE, 64)
    monkeypatch.setattr(loss, "LOGITS", 258 * 40)
    positions = [[at - 1 for at in range(1, len(labels)) if labels[at] != -100] for _, labels in ROWS]
    plan = loss._plan(model, ROWS, positions, 64, range(len(ROWS)))
    assert sorted(index for batch in plan for index in batch) == list(range(len(ROWS)))
    assert all(len(batch) == 1 or len(batch) * len({at for i in batch for at in positions[i]}) <= 40 for batch in plan)
    assert len(plan) > 4
    assert row_losses(model, ROWS, WHERE, 64)[0] == pytest.approx(expected, rel=1e-5)


def test_packed_a_prompt_of_20_tokens_with_two_answers_is_computed_once_and_the_head_runs_on_labels_alone():
    draw = torch.Generator().manual_seed(0)
    rows, prompts = [], [torch.randint(0, 258, (20,), generator=draw).tolist() for _ in range(5)]
    for answer in (3, 9):  # all of one length, then all of the other
        for prompt in prompts:
            ids = [*prompt, *torch.randint(0, 258, (answer,), generator=draw).tolist()]
            rows.append((ids, [*[-100] * 20, *ids[20:]]))
    model, where, through, head = tiny_llama(), [str(index) for index in range(10)], [], []
    expected, _ = row_losses(model, rows, where, 4)
    assert forward.enable(model) == ""
    model.model.layers[0].register_forward_hook(lambda _, args, output: through.append(args[0].shape[1]))
    model.lm_head.register_forward_hook(lambda _, args, output: head.append(args[0].shape[1]))
    nll, tokens = row_losses(model, rows, where, 4)
    assert nll == pytest.approx(expected, rel=1e-5)
    assert sum(through) == 5 * 20 + sum(tokens) == 5 * (20 + 3 + 9)
    assert sum(head) == sum(tokens)
    assert max(head) <= 4 * 9


def test_packed_with_rows_that_stay_padded_the_loss_is_the_same(monkeypatch):
    model = tiny_llama()
    expected, _ = row_losses(model, ROWS, WHERE, 4)
    assert forward.enable(model) == ""
    monkeypatch.setattr(forward, "_too_long", lambda *_: "so as to see it")
    assert row_losses(model, ROWS, WHERE, 4)[0] == pytest.approx(expected, rel=1e-5)


def test_a_label_at_the_first_position_is_not_counted_because_nothing_predicts_it():
    model = tiny_llama()
    ids = [5, 6, 7, 8]
    nll, tokens = row_losses(model, [(ids, ids)], ["a"], 1)
    assert tokens == [3]
    assert nll == pytest.approx([by_hand(model, ids, [-100, 6, 7, 8])], rel=1e-5)


def test_labels_in_several_turns_of_a_row_are_all_counted():
    ids = list(range(40, 60))
    labels = [token if 3 <= at < 6 or 15 <= at < 20 else -100 for at, token in enumerate(ids)]
    model = tiny_llama()
    nll, tokens = row_losses(model, [(ids, labels), (ids[:9], labels[:9])], ["a", "b"], 2)
    assert tokens == [8, 3]
    assert nll == pytest.approx([by_hand(model, ids, labels), by_hand(model, ids[:9], labels[:9])], rel=1e-5)


def test_a_row_without_supervised_tokens_counts_0_tokens_and_0_nats():
    nll, tokens = row_losses(tiny_llama(), [([1, 2, 3], [-100] * 3), ([1, 2, 3], [-100, 2, 3])], ["a", "b"], 4)
    assert tokens == [0, 2]
    assert nll[0] == 0.0
    assert nll[1] > 0.0


def test_dropout_is_off_and_training_mode_is_restored():
    model = tiny_gpt2()
    expected, _ = row_losses(model, ROWS, WHERE, 4)
    model.train()
    assert row_losses(model, ROWS, WHERE, 4)[0] == expected
    assert model.training
    assert torch.is_grad_enabled()


def test_a_loss_that_is_nan_is_an_error_naming_the_row_and_no_number():
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[ord("Z")] = math.nan
    rows = [*ROWS, ([60, ord("Z"), 61], [-100, -100, 61])]
    with pytest.raises(NumericsError, match=r"held\.jsonl:12: the model's loss is nan"):
        row_losses(model, rows, [*WHERE, "held.jsonl:12"], 64)


def test_progress_counts_the_rows_that_are_scored():
    told = []
    row_losses(tiny_llama(), ROWS, WHERE, 4, told.append)
    assert told[-1] == len(ROWS)
    assert told == sorted(told)


def test_the_general_text_has_7_paragraphs_of_at_least_50_words_and_every_token_is_supervised():
    rows = general_rows(TOKENIZER)
    words = [len(TOKENIZER.decode(ids).split()) for ids, _ in rows]
    assert len(rows) == 7
    assert min(words) >= 50
    assert 400 <= sum(words) <= 500
    assert all(ids == labels for ids, labels in rows)
