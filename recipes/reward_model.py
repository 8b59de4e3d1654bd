"""Reward model: one score for a whole answer, higher for the answer that people would prefer.

What it does
    Puts a head with a single output on a language model and trains it, with an adapter or in full, to give the chosen
    one of two answers the higher score. PPO maximises that score, so the report says whether it is good enough: better
    than chance, and better than judging by length alone.

Objective
    Bradley-Terry: p(chosen beats rejected) = sigmoid(r(chosen) - r(rejected)), r read at the end token
    minimise - mean log sigmoid(r(chosen) - r(rejected) - margin) + c * mean (r(chosen) + r(rejected))^2
    margin: 0, or the labels' own with margins=true.  c: center_rewards_coefficient, keeps scores around 0

Data in
    kind preference: prompt/chosen/rejected, whole conversations, hh-rlhf transcripts, scored or ranked answers, votes.

Artifact out
    adapter_model.safetensors with the head (or model.safetensors with lora.r=0), tokenizer, report with its gate, card.

What to watch
    accuracy rises from 0.5 and loss falls from ln 2 = 0.693. If training accuracy nears 1 while held-out loss rises,
    there are too many epochs and the rewards get overconfident. If held-out accuracy is no better than the length
    rule's, the model has learned length. Real preferences are noisy: small models reach 0.6 to 0.75 on them.

Paper
    Ouyang et al. 2022 (arXiv 2203.02155), Touvron et al. 2023 (arXiv 2307.09288: margins), Eisenstein et al. 2023
    (arXiv 2312.09244: centred rewards).
"""

from dataclasses import dataclass
from typing import ClassVar

from finetune_kit.data.load import load_data
from finetune_kit.data.trl_columns import whole_pairs
from finetune_kit.evaluation.evaluator import RewardEvaluator
from finetune_kit.models.reward import load_reward_model
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.runs.save import Artifact, save
from finetune_kit.settings.schema import LoraConfig, RecipeConfig, TrainConfig, section, setting
from finetune_kit.training.begin import begin
from finetune_kit.training.build import build
from finetune_kit.training.fit import fit


@dataclass
class Config(RecipeConfig):
    kind: ClassVar[str] = "preference"
    trainer_config: ClassVar[str] = "trl.RewardConfig"

    lora: LoraConfig = section(LoraConfig)
    train: TrainConfig = section(TrainConfig, learning_rate=1e-3, warmup_steps=0.05)
    center_rewards_coefficient: float = setting(
        0.01, "weight of mean (r(chosen) + r(rejected))^2, which keeps scores around 0; 0: off", within="[0, inf)"
    )
    margins: bool = setting(False, "train for a difference as large as the labels' margin; every row must have one")


def run(config: Config) -> Artifact:
    from trl import RewardConfig, RewardTrainer

    tokenizer = load_tokenizer(config.model)
    data = load_data(config.data, config.kind, tokenizer, seed=config.train.seed)
    rows = whole_pairs(data, config.margins)
    model = load_reward_model(config.model, config.lora, tokenizer, data.end_token_ids, seed=config.train.seed)
    trainer = build(
        RewardTrainer,
        RewardConfig,
        config,
        model,
        tokenizer,
        data,
        rows=rows,
        center_rewards_coefficient=config.center_rewards_coefficient or None,
        disable_dropout=not config.lora.lora_dropout,  # TRL would switch the adapter's dropout off, too
    )
    begin(config, tokenizer, data, model)
    evaluator = RewardEvaluator(tokenizer, data, config.evaluate)
    before = evaluator.measure(model, "before")
    history = fit(trainer, config.train, evaluator.scores)
    after = evaluator.measure(trainer.model, "after")
    return save(trainer.model, tokenizer, config, data, evaluator.compare(before, after), history)
