"""PPO: the policy writes, a reward judges, and what scored better than expected becomes more likely.

What it does
    Each update samples completions, scores them at their last token, charges every token for its distance from the
    reference, estimates advantages with a learned value, and takes several clipped steps. Policy, reference and value
    share one base: the reference is the base with the adapter off, the value is a head on the policy's trunk.

Objective
    maximise  E[ score - kl_coef * sum over tokens of (log p - log p_reference) ]  through, per token,
    min(ratio * A, clip(ratio, 1 - cliprange, 1 + cliprange) * A),   ratio = p / p_old,   A from GAE(gamma, lam)
    minus vf_coef * max((V - R)^2, (clip(V, V_old -+ cliprange_value) - R)^2) / 2;   docs/ppo.md has all of it.

Data in
    kind prompt: questions or conversations that wait for an answer, or reasoning_gym/<task>, which also scores them.

Artifact out
    adapter_model.safetensors, adapter_config.json (model.safetensors with lora.r=0), tokenizer, report, card;
    value.safetensors, the value's weights.

What to watch
    objective/scores rises while objective/kl stays in the tens. If objective/kl reaches the hundreds with rising
    scores, the policy is fooling the reward: raise kl_coef. If policy/clipfrac_avg is above 0.3 or val/ratio is away
    from 1, the learning_rate is too high. If val/explained_variance is below 0, the value misleads. If
    completions/ended falls, answers don't stop: raise missing_eos_penalty.

Paper
    PPO: Schulman et al. 2017 (arXiv 1707.06347); for language: Ouyang et al. 2022 (arXiv 2203.02155), Huang et al.
    2024 (arXiv 2403.17031).
"""

from dataclasses import dataclass
from typing import ClassVar

from finetune_kit.data.load import load_data
from finetune_kit.evaluation.evaluator import Evaluator
from finetune_kit.models.load import load_policy
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.rewards.sources import load_rewards
from finetune_kit.rl.settings import PPOSettings
from finetune_kit.runs.save import Artifact, save
from finetune_kit.settings.schema import EvaluateConfig, LoraConfig, TrainConfig, section
from finetune_kit.training.begin import begin


@dataclass
class Config(PPOSettings):
    kind: ClassVar[str] = "prompt"

    lora: LoraConfig = section(LoraConfig)
    # a fifth of lora_sft's rate: the data are the policy's own, and it must not outrun them
    train: TrainConfig = section(
        TrainConfig, learning_rate=1e-4, lr_scheduler_type="constant", logging_steps=1, num_train_epochs=5.0
    )
    evaluate: EvaluateConfig = section(EvaluateConfig, safety="xstest")


def run(config: Config) -> Artifact:
    from finetune_kit.rl.ppo import PPOTrainer

    tokenizer = load_tokenizer(config.model)
    data = load_data(config.data, config.kind, tokenizer, seed=config.train.seed)
    policy = load_policy(config.model, config.lora, seed=config.train.seed)
    rewards = load_rewards(config.reward, data, config.model, policy)
    trainer = PPOTrainer(policy, tokenizer, data, rewards, config)
    begin(config, tokenizer, data, policy)
    evaluator = Evaluator(tokenizer, data, config.evaluate, judge=rewards.judge, toolbox=trainer.toolbox)
    before = evaluator.measure(policy, "before")
    history = trainer.train()
    after = evaluator.measure(policy, "after")
    report = evaluator.compare(before, after, history)
    del trainer, rewards, evaluator  # optimizer, reference and judge need not be in memory beside the proof
    return save(policy, tokenizer, config, data, report, history)
