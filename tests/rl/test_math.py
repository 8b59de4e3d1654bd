"""rl/math.py by hand: every number here can be worked out on paper."""

import math

import pytest
import torch

from finetune_kit.rl.math import (
    adaptive_kl_coef,
    entropy_from_logits,
    explained_variance,
    gae,
    kl_k1,
    kl_k3,
    masked_mean,
    masked_variance,
    policy_loss,
    token_logprobs,
    token_rewards,
    value_loss,
    whiten,
)

FULL = torch.ones(1, 3, dtype=torch.bool)
SHORT = torch.tensor([[True, True, False]])


def rows(*numbers: float) -> torch.Tensor:
    return torch.tensor([numbers], dtype=torch.float32)


def test_gae_of_three_tokens_by_hand() -> None:
    # gamma 0.5, lam 0.5: delta = (0 + .5*2 - 1, 0 + .5*4 - 2, 8 - 4) = (0, 0, 4); A = (0 + .25*1, 0 + .25*4, 4)
    found = gae(rows(0, 0, 8), rows(1, 2, 4), FULL, gamma=0.5, lam=0.5)
    assert found.advantages.tolist() == [[0.25, 1, 4]]
    assert found.returns.tolist() == [[1.25, 3, 8]]


def test_gae_with_lambda_1_is_the_sum_of_later_rewards_minus_the_value() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(5, 7, generator=generator), torch.randn(5, 7, generator=generator)
    lengths = torch.tensor([7, 6, 3, 1, 5])
    mask = torch.arange(7) < lengths[:, None]
    found = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    for row, length in enumerate(lengths.tolist()):
        for t in range(length):
            later = sum(0.9 ** (k - t) * float(rewards[row, k]) for k in range(t, length))
            assert float(found.advantages[row, t]) == pytest.approx(later - float(values[row, t]), abs=1e-5)
            assert float(found.returns[row, t]) == pytest.approx(later, abs=1e-5)


def test_gae_with_lambda_0_is_the_error_one_token_ahead() -> None:
    found = gae(rows(1, 2, 3), rows(10, 20, 30), FULL, gamma=1.0, lam=0.0)
    assert found.advantages.tolist() == [[1 + 20 - 10, 2 + 30 - 20, 3 - 30]]


def test_gae_reads_nothing_behind_the_last_token() -> None:
    garbage = gae(rows(1, 2, math.nan), rows(3, 4, math.inf), SHORT, gamma=1.0, lam=0.95)
    clean = gae(rows(1, 2), rows(3, 4), SHORT[:, :2], gamma=1.0, lam=0.95)
    assert garbage.advantages.tolist() == [[*clean.advantages[0].tolist(), 0]]
    assert garbage.returns.tolist() == [[*clean.returns[0].tolist(), 0]]


def test_whitening_1_2_3_gives_mean_0_variance_1_and_keeps_the_mean_where_it_is_not_shifted() -> None:
    assert whiten(rows(1, 2, 3), FULL)[0].tolist() == pytest.approx([-1, 0, 1], abs=1e-6)
    assert whiten(rows(10, 20, 30), FULL, shift_mean=False)[0].tolist() == pytest.approx([19, 20, 21], abs=1e-5)
    assert whiten(rows(1, 3, math.nan), SHORT)[0].tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5), 0])


def test_alike_advantages_and_a_single_token_whiten_to_0_not_to_nan() -> None:
    assert whiten(rows(5, 5, 5), FULL).tolist() == [[0, 0, 0]]
    assert whiten(rows(5, 0, 0), torch.tensor([[True, False, False]])).tolist() == [[0, 0, 0]]


def test_mean_and_variance_over_two_processes_are_those_of_the_whole_batch() -> None:
    # process 0 has tokens 1 and 2, process 1 has 4: mean 7/3, variance 7/3; `sums` are over both
    here = rows(1, 2, 9)
    sums = iter([torch.tensor(7.0), torch.tensor(3), torch.tensor(7.0), torch.tensor(3), torch.tensor(14 / 3)])
    assert float(masked_mean(here, SHORT, lambda tensor: next(sums))) == pytest.approx(7 / 3)
    sums = iter([torch.tensor(7.0), torch.tensor(3), torch.tensor(14 / 3), torch.tensor(3)])
    assert float(masked_variance(here, SHORT, lambda tensor: next(sums))) == pytest.approx(7 / 3)
    whole = torch.tensor([[1.0, 2, 4]])
    assert float(masked_variance(whole, FULL)) == pytest.approx(7 / 3)


def test_kl_estimators_at_half_and_double_the_chance() -> None:
    p, q = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert float(kl_k1(p, q)) == pytest.approx(math.log(2))
    assert float(kl_k3(p, q)) == pytest.approx(0.5 - 1 + math.log(2))
    assert float(kl_k3(q, p)) == pytest.approx(2 - 1 - math.log(2))
    assert float(kl_k3(p, p)) == 0


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_both_estimators_have_the_true_kl_of_two_distributions_as_their_mean(estimator) -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    true = float((p * (p / q).log()).sum())
    assert float((p * estimator(p.log(), q.log())).sum()) == pytest.approx(true, abs=1e-6)


def test_the_score_comes_at_the_last_true_token_and_kl_at_every_one() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    kl = torch.tensor([[1.0, 2, 3], [4, 99, 99], [99, 99, 99]])
    found = token_rewards(torch.tensor([10.0, 20, 30]), kl, mask, kl_coef=0.5)
    assert found.tolist() == [[-0.5, -1, -1.5 + 10], [-2 + 20, 0, 0], [0, 0, 0]]


def test_policy_loss_by_hand_and_what_is_clipped() -> None:
    # ratios 1.5, 1.5, 0.5 with advantages 2, -2, -2 and cliprange 0.2: gains stop at 1.2 and 0.8, losses do not
    old, new = torch.zeros(1, 3), rows(math.log(1.5), math.log(1.5), math.log(0.5))
    found = policy_loss(new, old, rows(2, -2, -2), FULL, cliprange=0.2)
    assert float(found.loss) == pytest.approx(-2.4 + 3 + 1.6)
    assert float(found.clipped) == 2
    assert float(found.ratio) == pytest.approx(3.5)
    assert float(found.approxkl) == pytest.approx(3.5 - 3 - math.log(1.5 * 1.5 * 0.5))


def test_a_clipped_token_gets_no_gradient_and_one_that_must_come_back_does() -> None:
    new = rows(math.log(1.5), math.log(1.5), math.log(0.5)).requires_grad_()
    policy_loss(new, torch.zeros(1, 3), rows(2, -2, -2), FULL, cliprange=0.2).loss.backward()
    assert new.grad is not None
    assert new.grad[0].tolist() == pytest.approx([0, 3, 0])


def test_at_the_start_the_ratio_is_1_the_kl_0_and_the_gradient_that_of_the_policy_gradient() -> None:
    new = rows(-1, -2, -3).requires_grad_()
    found = policy_loss(new, new.detach(), rows(0.5, -1, 2), FULL, cliprange=0.2)
    found.loss.backward()
    assert float(found.ratio) == 3
    assert float(found.approxkl) == 0
    assert float(found.clipped) == 0
    assert new.grad is not None
    assert new.grad.tolist() == [[-0.5, 1, -2]]


def test_masked_tokens_get_no_gradient_even_where_they_are_nan() -> None:
    new = torch.tensor([[-1.0, -2, math.nan]], requires_grad=True)
    values = torch.tensor([[1.0, 2, math.inf]], requires_grad=True)
    policy = policy_loss(new, rows(-1.1, -2, math.nan), rows(1, 1, 7), SHORT, 0.2)
    value = value_loss(values, rows(1, 2, 0), rows(2, 2, math.nan), SHORT, 0.2)
    (policy.loss + value.loss).backward()
    assert new.grad is not None
    assert values.grad is not None
    assert new.grad[0, 2] == 0
    assert values.grad[0, 2] == 0
    assert math.isfinite((policy.loss + value.loss).item())


def test_value_loss_by_hand_and_what_is_clipped() -> None:
    # V 3 from V_old 1 is held at 1.5: towards R = 5 that leaves (1.5 - 5)^2, more than (3 - 5)^2
    found = value_loss(rows(3, 3, 1), rows(1, 1, 1), rows(5, 0, 2), FULL, cliprange_value=0.5)
    assert float(found.loss) == pytest.approx((3.5**2 + 3**2 + 1) / 2)
    assert float(found.clipped) == 1


def test_entropy_of_1_in_4_is_log_4_and_of_a_sure_thing_0() -> None:
    logits = torch.tensor([[0.0, 0, 0, 0], [100, 0, 0, 0]])
    assert entropy_from_logits(logits).tolist() == pytest.approx([math.log(4), 0], abs=1e-6)


def test_token_logprobs_are_those_of_log_softmax() -> None:
    logits, tokens = torch.randn(2, 3, 5), torch.tensor([[0, 1, 2], [3, 4, 0]])
    expected = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    assert torch.allclose(token_logprobs(logits, tokens), expected, atol=1e-6)


def test_explained_variance_is_1_for_the_returns_0_for_a_constant_and_below_0_for_their_opposite() -> None:
    returns = rows(1, 2, 3)
    assert explained_variance(returns, returns, FULL) == 1
    assert explained_variance(rows(7, 7, 7), returns, FULL) == pytest.approx(0)
    assert explained_variance(-returns, returns, FULL) == pytest.approx(-3)
    assert explained_variance(rows(1, 2, 3), rows(4, 4, 4), FULL) == 0


def test_the_coefficient_follows_the_kl_by_at_most_20_percent_of_completions_over_horizon() -> None:
    assert adaptive_kl_coef(0.1, kl=6, target=6, completions=100, horizon=1000) == 0.1
    assert adaptive_kl_coef(0.1, kl=6.6, target=6, completions=100, horizon=1000) == pytest.approx(0.1 * 1.01)
    assert adaptive_kl_coef(0.1, kl=600, target=6, completions=100, horizon=1000) == pytest.approx(0.1 * 1.02)
    assert adaptive_kl_coef(0.1, kl=-9, target=6, completions=100, horizon=1000) == pytest.approx(0.1 * 0.98)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_two_token_bandit_is_solved_in_50_updates(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(50):
        tokens = torch.multinomial(logits.detach().softmax(0), 32, replacement=True, generator=generator)
        rewards, mask = (tokens == 1).float()[:, None], torch.ones(32, 1, dtype=torch.bool)
        old = token_logprobs(logits.detach().expand(32, 2), tokens)[:, None]
        advantages = whiten(gae(rewards, torch.zeros(32, 1), mask, 1.0, 0.95).advantages, mask)
        for _ in range(4):
            new = token_logprobs(logits.expand(32, 2), tokens)[:, None]
            optimizer.zero_grad()
            (policy_loss(new, old, advantages, mask, 0.2).loss / 32).backward()
            optimizer.step()
    assert float(logits.detach().softmax(0)[1]) > 0.95
