"""ORPO: supervised fine-tuning and preference learning in one stage, without a reference model.

What it does
    Trains a policy on the chosen answers as lora_sft would, and at the same time shifts the odds from the rejected
    answers to the chosen ones. There is no reference: one model, one stage. lora.r=0 trains all weights.

Objective
    odds(y | x) = p / (1 - p)        p: geometric mean of the answer's token probabilities
    minimise  - (1 / N) * sum over tokens of prompt and chosen answer of log p(token)
              - beta * log sigmoid(log(odds(chosen | x) / odds(rejected | x)))

Data in
    kind preference: prompt with chosen and rejected, whole conversations, hh-rlhf transcripts, scored or ranked
    answers, two answers and votes, reasoning_gym/<task> (the right answer against a wrong one).

Artifact out
    an adapter (adapter_model.safetensors, adapter_config.json) or a whole model; tokenizer, template, report, card.

What to watch
    nll_loss falls as in supervised training, and log_odds_chosen rises. If the answers are learned but the odds aren't,
    use a larger beta. The loss counts the prompt's tokens, as the authors' code does.

Paper
    ORPO: Hong et al. 2024 (arXiv 2403.07691). The trainer is in trl.experimental.
"""

from dataclasses import dataclass
from typing import ClassVar

from finetune_kit.data.load import load_data
from finetune_kit.data.trl_columns import masked_pairs
from finetune_kit.evaluation.evaluator import Evaluator
from finetune_kit.models.load import load_policy
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.runs.save import Artifact, save
from finetune_kit.settings.schema import EvaluateConfig, LoraConfig, RecipeConfig, TrainConfig, section, setting
from finetune_kit.training.begin import begin
from finetune_kit.training.build import build
from finetune_kit.training.fit import fit


@dataclass
class Config(RecipeConfig):
    kind: ClassVar[str] = "preference"
    trainer_config: ClassVar[str] = "trl.experimental.orpo.ORPOConfig"
    lora: LoraConfig = section(LoraConfig)
    train: TrainConfig = section(TrainConfig, learning_rate=5e-4, warmup_steps=0.05)
    evaluate: EvaluateConfig = section(EvaluateConfig, safety="xstest")
    beta: float = setting(0.1, "weight of the odds ratio (the paper's lambda)", within="(0, 10]")

    @property
    def micro_batch_dependence(self) -> str:
        return "the likelihood term is a mean over the labels of one forward pass"


def run(config: Config) -> Artifact:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    tokenizer = load_tokenizer(config.model)
    pairs = load_data(config.data, config.kind, tokenizer, seed=config.train.seed)
    policy = load_policy(config.model, config.lora, seed=config.train.seed)
    trainer = build(
        ORPOTrainer,
        ORPOConfig,
        config,
        policy,
        tokenizer,
        pairs,
        rows=masked_pairs(pairs),
        tokenises=True,
        beta=config.beta,
        disable_dropout=not config.lora.lora_dropout,
    )
    begin(config, tokenizer, pairs, policy)
    evaluator = Evaluator(tokenizer, pairs, config.evaluate, beta=config.beta)
    before = evaluator.measure(policy, "before")
    history = fit(trainer, config.train, evaluator.scores)
    after = evaluator.measure(trainer.model, "after")
    return save(trainer.model, tokenizer, config, pairs, evaluator.compare(before, after), history)
