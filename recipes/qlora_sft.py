"""QLoRA supervised fine-tuning: an adapter on a base whose weights are kept in 4 bits.

What it does
    Loads a causal language model with its linear layers quantised to 4 bits, freezes it, and trains low-rank updates in
    float32 on top. A model of 8 billion parameters trains on a GPU with 12 GB. It also runs on a CPU and saves memory
    for big models there, but each step takes longer than with lora_sft.

Objective
    W' = dequantise(Q) + (lora_alpha / r) * B A        Q: NF4, 64 weights a block, the blocks' scales quantised as well
    minimise over A and B  - (1 / N) * sum over supervised tokens t of log p(token_t | tokens before t)

Data in
    kind prompt_completion or text: messages, ShareGPT, alpaca, question/answer, prompt/completion, tool calls, .txt.

Artifact out
    adapter_model.safetensors, adapter_config.json, tokenizer, chat template, report, card. The adapter belongs to the
    4-bit base. To get a plain model, use the merge command, which measures what merging costs.

What to watch
    as in lora_sft. The loss starts a little higher: that is the price of 4 bits, and the adapter learns to undo part of
    it. "before" in the report is the 4-bit base, so the report credits only the training.

Paper
    QLoRA: Dettmers et al. 2023 (arXiv 2305.14314).
"""

from dataclasses import dataclass
from typing import ClassVar

from finetune_kit.data.load import load_data
from finetune_kit.evaluation.evaluator import Evaluator
from finetune_kit.generation.toolbox import toolbox_of
from finetune_kit.models.load import load_policy
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.runs.save import Artifact, save
from finetune_kit.settings.schema import LoraConfig, ModelConfig, ToolsRecipeConfig, TrainConfig, section
from finetune_kit.training.begin import begin
from finetune_kit.training.build import build
from finetune_kit.training.fit import fit


@dataclass
class Config(ToolsRecipeConfig):
    trainer_config: ClassVar[str] = "trl.SFTConfig"
    model: ModelConfig = section(ModelConfig, load_in_4bit=True)
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
