"""KTO: single answers, each liked or not, teach a policy to write the kind that is liked.

What it does
    Trains a policy on answers with one label each, such as thumbs up or down; it needs no pairs. The reference is the
    policy at the start. By default only an adapter is trained; lora.r=0 trains all weights.

Objective
    reward(x, y) = beta * (log p(y | x) - log p_reference(y | x))        z = beta * KL(p || p_reference), of the batch
    minimise  desirable_weight * (1 - sigmoid(reward - z))   of liked answers
            + undesirable_weight * (1 - sigmoid(z - reward)) of the others        at the start 0.5 a row, weights 1

Data in
    kind labelled_completion: prompt, completion, label (true or false); a pair of answers is taken as one of each.

Artifact out
    an adapter (adapter_model.safetensors, adapter_config.json) or a whole model; tokenizer, template, report, card.

What to watch
    rewards/chosen rises above rewards/rejected. If kl stays near 0, raise the learning_rate. If one label is much more
    frequent, bring desirable_weight * liked to 1 to 4/3 of undesirable_weight * disliked. Batches below 8 rows make
    z noisy.

Paper
    KTO: Ethayarajh et al. 2024 (arXiv 2402.01306).
"""

from dataclasses import dataclass
from typing import ClassVar

from finetune_kit.data.load import load_data
from finetune_kit.data.trl_columns import rotated
from finetune_kit.evaluation.evaluator import Evaluator
from finetune_kit.models.load import load_policy
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.runs.save import Artifact, save
from finetune_kit.settings.schema import EvaluateConfig, LoraConfig, RecipeConfig, TrainConfig, section, setting
from finetune_kit.training.begin import begin
from finetune_kit.training.build import build
from finetune_kit.training.fit import fit
from finetune_kit.training.reference import frozen_copy, release_copy


@dataclass
class Config(RecipeConfig):
    kind: ClassVar[str] = "labelled_completion"
    trainer_config: ClassVar[str] = "trl.KTOConfig"
    lora: LoraConfig = section(LoraConfig)
    train: TrainConfig = section(TrainConfig, learning_rate=5e-5, warmup_steps=0.1, per_device_train_batch_size=16)
    evaluate: EvaluateConfig = section(EvaluateConfig, safety="xstest")
    beta: float = setting(0.1, "how strongly the policy is kept close to the reference", within="(0, 10]")
    desirable_weight: float = setting(1.0, "weight of the liked answers", within="(0, 10]")
    undesirable_weight: float = setting(1.0, "weight of the others", within="(0, 10]")

    @property
    def micro_batch_dependence(self) -> str:
        return "z is a mean over the rows of one forward pass"


def run(config: Config) -> Artifact:
    from trl import KTOConfig, KTOTrainer

    tokenizer = load_tokenizer(config.model)
    data = load_data(config.data, config.kind, tokenizer, seed=config.train.seed)
    policy = load_policy(config.model, config.lora, seed=config.train.seed)
    trainer = build(
        KTOTrainer,
        KTOConfig,
        config,
        policy,
        tokenizer,
        data,
        rows=rotated(data, config.train),
        tokenises=True,
        parts=frozen_copy(policy, config),
        beta=config.beta,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
        disable_dropout=not config.lora.lora_dropout,
    )
    begin(config, tokenizer, data, policy)
    release_copy(trainer, config)
    evaluator = Evaluator(tokenizer, data, config.evaluate, beta=config.beta)
    before = evaluator.measure(policy, "before")
    history = fit(trainer, config.train, evaluator.scores)
    after = evaluator.measure(trainer.model, "after")
    return save(trainer.model, tokenizer, config, data, evaluator.compare(before, after), history)
