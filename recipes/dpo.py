"""Direct preference optimisation: chosen answers become likelier than rejected ones.

What it does
    Trains a policy on pairs of answers, without a reward model and without sampling. The reference is the policy at the
    start: its log-probabilities are computed once and kept. By default only an adapter is trained; lora.r=0 trains all
    weights.

Objective
    reward(x, y) = beta * (log p(y | x) - log p_reference(y | x))
    minimise  - log sigmoid(reward(x, chosen) - reward(x, rejected))        loss_type=[sigmoid]; at the start ln 2
    beta small: far from the reference; beta large: close to it.

Data in
    kind preference: prompt with chosen and rejected, whole conversations, hh-rlhf transcripts, scored or ranked
    answers, two answers and votes, reasoning_gym/<task> (the right answer against a wrong one).

Artifact out
    an adapter (adapter_model.safetensors, adapter_config.json) or a whole model; tokenizer, template, report, card.

What to watch
    rewards/accuracies rises above 0.5 and rewards/margins grows. It is normal for logps/chosen to fall a little; the
    report says so in words. If it falls and the answers get worse, use a smaller learning_rate, a larger beta, or
    loss_type=[sigmoid,sft], which keeps the chosen answers likely. If answers grow longer without getting better, they
    show the length bias of the pairs.

Paper
    DPO: Rafailov et al. 2023 (arXiv 2305.18290). The other losses carry TRL's names.
"""

from dataclasses import dataclass
from typing import ClassVar

from finetune_kit.data.load import load_data
from finetune_kit.evaluation.evaluator import Evaluator
from finetune_kit.generation.toolbox import toolbox_of
from finetune_kit.models.load import load_policy
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.runs.save import Artifact, save
from finetune_kit.settings.schema import EvaluateConfig, LoraConfig, ToolsRecipeConfig, TrainConfig, section, setting
from finetune_kit.training.begin import begin
from finetune_kit.training.build import build
from finetune_kit.training.fit import fit
from finetune_kit.training.reference import frozen_copy, set_reference


@dataclass
class Config(ToolsRecipeConfig):
    kind: ClassVar[str] = "preference"
    trainer_config: ClassVar[str] = "trl.DPOConfig"
    lora: LoraConfig = section(LoraConfig)
    train: TrainConfig = section(TrainConfig, learning_rate=5e-5, warmup_steps=0.1)
    evaluate: EvaluateConfig = section(EvaluateConfig, safety="xstest")
    beta: float = setting(0.1, "how strongly the policy is kept close to the reference", within="(0, 10]")
    loss_type: list[str] = setting(["sigmoid"], "loss by TRL's name, or several added up: sigmoid, ipo, hinge, sft, …")
    loss_weights: list[float] = setting([], "weights of several losses; unset: 1 each", within="[0, inf)")
    label_smoothing: float = setting(
        0.0, "share of pairs that may be the wrong way round; for loss_type=[robust]", "share", within="[0, 0.5)"
    )
    precompute_ref_log_probs: bool = setting(True, "compute the reference's log-probabilities once and keep them")

    @property
    def micro_batch_dependence(self) -> str:
        if "sft" in self.loss_type:
            return "loss_type=sft is a mean over the labels of one forward pass"
        sorts = {"aot", "aot_unpaired"} & set(self.loss_type)
        return f"loss_type={min(sorts)} sorts the rows of one forward pass" if sorts else ""


def run(config: Config) -> Artifact:
    from trl import DPOConfig, DPOTrainer

    tokenizer = load_tokenizer(config.model)
    pairs = load_data(config.data, config.kind, tokenizer, seed=config.train.seed)
    policy = load_policy(config.model, config.lora, seed=config.train.seed)
    trainer = build(
        DPOTrainer,
        DPOConfig,
        config,
        policy,
        tokenizer,
        pairs,
        tokenises=True,
        parts=frozen_copy(policy, config),
        beta=config.beta,
        loss_type=config.loss_type,
        loss_weights=config.loss_weights or None,
        label_smoothing=config.label_smoothing,
        disable_dropout=not config.lora.lora_dropout,
        precompute_ref_log_probs=config.precompute_ref_log_probs,
    )
    begin(config, tokenizer, pairs, policy)
    set_reference(trainer, config, pairs)
    evaluator = Evaluator(tokenizer, pairs, config.evaluate, beta=config.beta, toolbox=toolbox_of(config))
    before = evaluator.measure(policy, "before")
    history = fit(trainer, config.train, evaluator.scores)
    after = evaluator.measure(trainer.model, "after")
    return save(trainer.model, tokenizer, config, pairs, evaluator.compare(before, after), history)
