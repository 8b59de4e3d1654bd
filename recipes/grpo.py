"""GRPO: several completions of each prompt, each judged against the others; no value model.

What it does
    Samples num_generations completions of each prompt, scores them, and makes those above their group's mean likelier.
    By default only an adapter is trained; lora.r=0 trains all weights. Rewards, prompts and report are those of ppo;
    the trainer is TRL's.

Objective
    A = (score - mean of the group) / (standard deviation of the group)        the same for all tokens of a completion
    maximise  min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon) * A) - beta * KL(p || p_reference), per token

Data in
    kind prompt: questions or conversations that wait for an answer, or reasoning_gym/<task>, which also scores them.

Artifact out
    an adapter (adapter_model.safetensors, adapter_config.json) or a whole model; tokenizer, template, report, card.

What to watch
    reward rises. frac_reward_zero_std is the share of groups that score alike and teach nothing. If it is high, the
    prompts are too easy or too hard, or the temperature is too low. If completions/clipped_ratio is near 1, answers
    don't end.

Paper
    GRPO: Shao et al. 2024 (arXiv 2402.03300); the loss over all tokens of a step: DAPO, Yu et al. 2025 (2503.14476).
"""

from dataclasses import dataclass
from typing import ClassVar

from finetune_kit.data.load import load_data
from finetune_kit.evaluation.evaluator import Evaluator
from finetune_kit.generation.toolbox import toolbox_of
from finetune_kit.models.load import load_policy
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.rewards.settings import RewardConfig
from finetune_kit.rewards.sources import load_rewards
from finetune_kit.rl.online import (
    check_groups,
    prompt_rows,
    rendering_rows,
    reward_functions,
    reward_watchdog,
    sample_here,
    tool_rollouts,
)
from finetune_kit.runs.save import Artifact, save
from finetune_kit.settings.schema import EvaluateConfig, LoraConfig, ToolsRecipeConfig, TrainConfig, section, setting
from finetune_kit.training.begin import begin
from finetune_kit.training.build import build
from finetune_kit.training.fit import fit


@dataclass
class Config(ToolsRecipeConfig):
    kind: ClassVar[str] = "prompt"
    trainer_config: ClassVar[str] = "trl.GRPOConfig"
    lora: LoraConfig = section(LoraConfig)
    train: TrainConfig = section(TrainConfig, learning_rate=1e-4, per_device_train_batch_size=32, logging_steps=1)
    evaluate: EvaluateConfig = section(EvaluateConfig, safety="xstest")
    reward: RewardConfig = section(RewardConfig)
    num_generations: int = setting(8, "completions of each prompt, judged against each other", within="[2, inf)")
    max_completion_length: int = setting(64, "longest completion", "tokens", within="[1, inf)")
    temperature: float = setting(1.0, "temperature of sampling and of every log-probability", within="(0, inf)")
    beta: float = setting(0.0, "price of one nat away from the reference; 0: no reference", within="[0, inf)")
    epsilon: float = setting(0.2, "clip range of the ratio to the sampling policy", within="(0, 1)")
    num_iterations: int = setting(1, "passes over each step's completions", within="[1, inf)")

    def check_itself(self) -> None:
        check_groups(self, self.num_generations)


def run(config: Config) -> Artifact:
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = load_tokenizer(config.model)
    data = load_data(config.data, config.kind, tokenizer, seed=config.train.seed)
    rewards = load_rewards(config.reward, data, config.model)
    policy = load_policy(config.model, config.lora, seed=config.train.seed)
    policy.generation_config.eos_token_id = data.end_token_ids
    sample_here(policy)
    toolbox = toolbox_of(config)
    trainer = build(
        GRPOTrainer,
        GRPOConfig,
        config,
        policy,
        tokenizer,
        data,
        rows=prompt_rows(data),
        parts={
            "reward_funcs": reward_functions(rewards, data),
            "callbacks": [reward_watchdog()],
            "processing_class": rendering_rows(tokenizer, data),
            "rollout_func": tool_rollouts(tokenizer, data, toolbox, config),
        },
        reward_weights=[part.weight for part in rewards.parts],
        num_generations=config.num_generations,
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        beta=config.beta,
        epsilon=config.epsilon,
        num_iterations=config.num_iterations,
    )
    begin(config, tokenizer, data, policy)
    evaluator = Evaluator(tokenizer, data, config.evaluate, judge=rewards.judge, toolbox=toolbox)
    before = evaluator.measure(policy, "before")
    history = fit(trainer, config.train, evaluator.scores)
    after = evaluator.measure(trainer.model, "after")
    return save(trainer.model, tokenizer, config, data, evaluator.compare(before, after), history)
