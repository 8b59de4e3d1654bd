"""LoRA supervised fine-tuning: a small adapter learns the answers, the base model stays as it is.

What it does
    Freezes a causal language model and trains low-rank updates for its linear layers. The artifact is a few megabytes,
    adapters share the base, and switching the adapter off gives exactly the base.

Objective
    W' = W + (lora_alpha / r) * B A        A: (r, inputs), B: (outputs, r), B = 0 at the start
    minimise over A and B  - (1 / N) * sum over supervised tokens t of log p(token_t | tokens before t)

Data in
    kind prompt_completion or text: messages, ShareGPT, alpaca, question/answer, prompt/completion, tool calls, .txt.

Artifact out
    adapter_model.safetensors, adapter_config.json, tokenizer, chat template, report, card.

What to watch
    loss falls within the first few dozen steps. If it doesn't, the learning_rate is too low (an adapter wants at least
    ten times that of full_sft) or r is too small for the data. If grad_norm is above max_grad_norm at every step, the
    rate is too high. If held-out loss rises, there are too many epochs. If few answers end by themselves, the model
    hasn't learned the end token.

Paper
    LoRA: Hu et al. 2021 (arXiv 2106.09685); which layers and rates: "LoRA Without Regret" (Thinking Machines, 2025).
"""

from dataclasses import dataclass
from typing import ClassVar

from finetune_kit.data.load import load_data
from finetune_kit.evaluation.evaluator import Evaluator
from finetune_kit.generation.toolbox import toolbox_of
from finetune_kit.models.load import load_policy
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.runs.save import Artifact, save
from finetune_kit.settings.schema import LoraConfig, ToolsRecipeConfig, TrainConfig, section
from finetune_kit.training.begin import begin
from finetune_kit.training.build import build
from finetune_kit.training.fit import fit


@dataclass
class Config(ToolsRecipeConfig):
    trainer_config: ClassVar[str] = "trl.SFTConfig"
    lora: LoraConfig = section(LoraConfig)
    # far above full_sft's rate: the adapter's weights start at zero and are few
    train: TrainConfig = section(TrainConfig, learning_rate=5e-4, warmup_steps=0.05)


def run(config: Config) -> Artifact:
    from trl import SFTConfig, SFTTrainer

    tokenizer = load_tokenizer(config.model)
    data = load_data(config.data, config.kind, tokenizer, seed=config.train.seed)
    policy = load_policy(config.model, config.lora, seed=config.train.seed)
    trainer = build(SFTTrainer, SFTConfig, config, policy, tokenizer, data)
    begin(config, tokenizer, data, policy)
    evaluator = Evaluator(tokenizer, data, config.evaluate, toolbox=toolbox_of(config))
    before = evaluator.measure(policy, "before")
    history = fit(trainer, config.train, evaluator.scores)
    after = evaluator.measure(trainer.model, "after")
    return save(trainer.model, tokenizer, config, data, evaluator.compare(before, after), history)
