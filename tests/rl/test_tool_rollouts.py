"""Rollouts that call tools, in ppo and grpo: what a tool returned is read and moves nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_kit.data.chat import written_turn
from finetune_kit.errors import SettingsError
from finetune_kit.evaluation.measure import measure
from finetune_kit.evaluation.tools import tools_report
from finetune_kit.generation.generate import Call
from finetune_kit.generation.tool_loop import sampling
from finetune_kit.generation.toolbox import Toolbox
from finetune_kit.models.completion_rows import make_rows
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.rewards.sources import load_rewards
from finetune_kit.rl import tool_rollouts
from finetune_kit.rl.ppo import PPOTrainer
from finetune_kit.rl.tool_rollouts import call_figures, check_template
from finetune_kit.settings.schema import EvaluateConfig, ModelConfig
from finetune_kit.tools.load import load_tools
from tests.fixtures_training import fit_only, prepare, write_rows
from tests.generation.test_tool_loop import template
from tests.rl.fixtures import parts, settings, trainer, weights, write_home

TOOLS = ("tools=[calculator]", "max_new_tokens=120", "batch_size=8", "num_mini_batches=1", "num_ppo_epochs=1")
GRPO = ("tools=[calculator]", "max_completion_length=120", "per_device_train_batch_size=8", "num_generations=4")
REWARD = """
def score(prompts, completions, records, calls):
    return [len(text) / 100 + sum(call["ok"] for call in made) for text, made in zip(completions, calls)]

def trl(completions, calls, **columns):
    assert all(isinstance(made, list) for made in calls)
    for turns, made in zip(completions, calls):
        assert [turn["content"] for turn in turns if turn["role"] == "tool"] == [call["result"] for call in made]
    return [float(made[0]["result"]) if made else 0.0 for made in calls]
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Prompts of a policy that begins each answer with a call of `n + n`, and then writes what it draws."""
    write_home(tmp_path)
    write_rows(
        tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": f"{n} + {n} ="}]} for n in range(40)]
    )
    (tmp_path / "rewards.py").write_text(REWARD)
    HELD["tokenizer"] = load_tokenizer(ModelConfig(str(tmp_path / "tiny")))
    monkeypatch.setattr(tool_rollouts, "sampling", calling_first)
    return tmp_path


def calling_first(*, seed: int, temperature: float) -> Callable[[Any, list[list[int]]], list[int]]:
    tokenizer, draw = HELD["tokenizer"], sampling(seed=seed, temperature=temperature)

    def chosen(logits: Any, rows: list[list[int]]) -> list[int]:
        drawn = draw(logits, rows)
        for place, ids in enumerate(rows):
            text = tokenizer.decode(ids)
            question, _, written = text.rpartition("<|im_start|>user\n")[2].partition(
                "<|im_end|>\n<|im_start|>assistant\n"
            )
            turn = calling(tokenizer, question.removesuffix(" ="))
            so_far = tokenizer(written, add_special_tokens=False)["input_ids"]
            if len(so_far) < len(turn) and turn[: len(so_far)] == so_far:
                drawn[place] = turn[len(so_far)]
        return drawn

    return chosen


HELD: dict[str, Any] = {}


def calling(tokenizer: Any, expression: str) -> list[int]:
    """The token ids of a turn that calls, its end token included."""
    function = {"name": "calculator", "arguments": {"expression": expression}}
    answer = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    turn = written_turn(
        tokenizer, [{"role": "user", "content": "?"}], answer, [tool.schema for tool in BOX.tools.values()]
    )
    ids: list[int] = tokenizer(turn.completion, add_special_tokens=False)["input_ids"]
    return ids


BOX = Toolbox(load_tools(["calculator"]))


def made(home: Path, *words: str) -> PPOTrainer:
    return trainer(home, *TOOLS, *words)


def alone(model: Any, prompt: list[int], completion: list[int], temperature: float = 1.0) -> torch.Tensor:
    """The log-probabilities of a completion's tokens, by a plain forward pass of the whole text."""
    ids = torch.tensor([[*prompt, *completion]])
    logits = model(input_ids=ids, use_cache=False).logits[0].float() / temperature
    chances = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return chances.gather(1, torch.tensor(completion)[:, None])[:, 0]


def test_rows_with_what_a_tool_returned_place_the_policy_s_own_tokens_one_behind_the_other() -> None:
    rows = make_rows([[5, 6], [7]], [[10, 11, 12, 13], [20]], 3, "cpu", [[True, False, False, True], [True]])
    assert rows.input_ids.tolist() == [[5, 6, 10, 11, 12, 13], [7, 20, 0, 0, 0, 0]]
    assert rows.tokens.tolist() == [10, 13, 20]
    assert rows.before.tolist() == [1, 4, 6]
    assert rows.mask.tolist() == [[True, True, False], [True, False, False]]
    assert rows.spread(torch.tensor([1.0, 2.0, 3.0])).tolist() == [[1, 2, 0], [3, 0, 0]]


def test_ppo_looks_at_own_tokens_alone_with_the_results_in_place(home: Path) -> None:
    policy = made(home, "temperature=0.7", "lora.lora_dropout=0")
    rollout, line = policy._roll_out(policy._order(0))
    assert line["tools/call_frequency"] == 1
    assert line["tools/failure_frequency"] == 0
    for row, (prompt, completion, own) in enumerate(
        zip(rollout.prompts, rollout.completions, rollout.own, strict=True)
    ):
        text = policy.tokenizer.decode(completion)
        returned = policy.tokenizer.decode([token for token, mine in zip(completion, own, strict=True) if not mine])
        asked = policy.tokenizer.decode(prompt).rpartition("user\n")[2].partition(" =")[0]
        assert str(2 * int(asked.split()[0])) in returned
        assert "<tool_call>" not in returned
        assert returned in text
        expected = alone(policy.model, prompt, completion, 0.7)[torch.tensor(own)]
        count = sum(own)
        assert int(rollout.mask[row].sum()) == count < len(completion)
        torch.testing.assert_close(rollout.logprobs[row, :count], expected, rtol=0, atol=1e-4)
        assert not rollout.advantages[row, count:].any()
    assert line["completions/mean_length"] == rollout.mask.sum() / len(rollout.own)


@pytest.mark.parametrize("padding_free", ["true", "false"])
def test_ppo_s_gradient_is_that_of_the_own_tokens_of_the_whole_text(home: Path, padding_free: str) -> None:
    policy = made(home, "lora.r=0", "vf_coef=0", f"train.padding_free={padding_free}")
    rollout, _ = policy._roll_out(policy._order(0))
    policy._loss(rollout, list(range(8)))[0].backward()
    found = {name: p.grad.clone() for name, p in policy.trained.items() if p.grad is not None}
    policy.model.zero_grad()
    total = torch.zeros(())
    for row, (prompt, completion, own) in enumerate(
        zip(rollout.prompts, rollout.completions, rollout.own, strict=True)
    ):
        chances = alone(policy.model, prompt, completion)[torch.tensor(own)]
        total = total - (rollout.advantages[row, : len(chances)] * chances).sum()
    total.backward()
    for name, parameter in policy.trained.items():
        if parameter.grad is not None and name in found:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-4)


def test_ppo_resumed_with_tools_is_the_uninterrupted_run_to_the_bit(home: Path) -> None:
    words = ("max_steps=3", "save_steps=2", "num_mini_batches=2", "batch_size=4", "per_device_train_batch_size=2")
    whole = made(home, *words, f"output_dir={home / 'whole'}")
    expected = whole.train()
    torch.manual_seed(12345)
    rest = made(home, *words, f"output_dir={home / 'rest'}")
    rest.resume(home / "whole" / "checkpoint-2")
    found = rest.train()
    times = ("time/", "tokens_per", "seconds", "peak")
    lines = (*expected[2:], *found)
    plain = [{key: value for key, value in line.items() if not key.startswith(times)} for line in lines]
    assert plain[0] == plain[1]
    assert plain[0]["tools/call_frequency"] == 1
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(rest)[name])


def test_grpo_s_gradient_and_figures_are_those_of_the_own_tokens_of_the_whole_text(home: Path) -> None:
    sources = f"reward.sources=[{home / 'rewards.py'}:score]"
    run = prepare("grpo", home, sources, *GRPO, "lora.r=0", "beta=0.5", "temperature=0.7")
    model, trl = run.trainer.model, run.trainer
    model.train()
    inputs = [run.trainer.train_dataset[index // 4] for index in range(8)]
    batch = trl._generate_and_score_completions(inputs)
    assert (batch["tool_mask"] == 0).sum() > 8
    trl.current_gradient_accumulation_steps = 1
    loss = trl.compute_loss(model, batch)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total, kls, count = torch.zeros(()), torch.zeros(()), 0
    for row in range(8):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
        own = batch["tool_mask"][row][: len(completion)].bool()
        chances = alone(model, prompt, completion, 0.7)[own]
        far = torch.expm1(chances.detach() - chances) - (chances.detach() - chances)  # the reference is the start
        total = total - batch["advantages"][row] * torch.exp(chances - chances.detach()).sum() + 0.5 * far.sum()
        kls, count = kls + far.sum().detach(), count + int(own.sum())
    (total / count).backward()
    assert float(loss) == pytest.approx(float(total / count), abs=1e-4)
    for name, parameter in model.named_parameters():
        if name in found and parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.long
def test_rewards_see_the_calls_in_grpo_and_ppo_and_in_the_report(home: Path) -> None:
    sources = f"reward.sources=[{home / 'rewards.py'}:score, {home / 'rewards.py'}:trl]"
    line = fit_only("grpo", home, sources, *GRPO, "max_steps=1").history[0]
    assert line["tools/call_frequency"] == 1
    assert line["rewards/score/mean"] >= 1
    assert line["rewards/trl/mean"] >= 0
    config = settings(home, sources, *TOOLS)
    policy, tokenizer, data = parts(config)
    rewards = load_rewards(config.reward, data, config.model)
    first = PPOTrainer(policy, tokenizer, data, rewards, config).update()
    assert first["reward/score"] >= 1
    assert first["reward/trl"] >= 0
    measuring = EvaluateConfig(size=2, max_new_tokens=4, general_text=False, bootstrap_samples=50)
    side = measure(policy, tokenizer, data, measuring, judge=rewards.judge, toolbox=BOX)
    report = tools_report(side, side, measuring)["after"]
    assert [(score["name"], score["rows"]) for score in report["scores"]] == [("reward", "all")]
    assert report["calls"]["needless"] is None  # prompts do not say whether they want a call
    assert report["calls"]["rows_that_want_none"] == report["calls"]["rows_that_want_some"] == 0


@pytest.mark.long
def test_grpo_resumed_with_tools_is_the_uninterrupted_run_to_the_bit(home: Path) -> None:
    sources = f"reward.sources=[{home / 'rewards.py'}:score]"
    words = (sources, *GRPO, "save_steps=2", "temperature=1.5")
    whole = fit_only("grpo", home, *words, "max_steps=4", f"output_dir={home / 'whole'}")
    rest = prepare("grpo", home, *words, "max_steps=4", f"output_dir={home / 'rest'}")
    torch.manual_seed(12345)
    rest.trainer.train(resume_from_checkpoint=str(home / "whole" / "checkpoint-2"))
    assert whole.moved > 0
    for name, weight in rest.weights.items():
        assert torch.equal(weight, whole.weights[name])


def test_a_template_that_rewrites_earlier_turns_is_refused_for_rollouts() -> None:
    check_template(template("plain"), BOX)
    check_template(template("qwen2_5"), BOX)
    with pytest.raises(SettingsError, match="writes earlier turns otherwise once a tool has answered"):
        check_template(template("qwen3"), BOX)


def test_calls_are_counted_by_the_completion_and_vllm_samples_without_tools(home: Path) -> None:
    good, bad = Call("f", {}, "1", True, True, 0.0), Call("f", {}, "Error: x", True, False, 0.0)
    assert call_figures([[good, bad], []]) == {"tools/call_frequency": 1.0, "tools/failure_frequency": 0.5}
    assert call_figures([[]]) == {"tools/call_frequency": 0.0, "tools/failure_frequency": 0.0}
    with pytest.raises(SettingsError, match="samples without tools"):
        made(home, "use_vllm=true")
