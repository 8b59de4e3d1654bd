"""Pretraining: a language model from random weights, its tokenizer included, learns to continue your texts.

What it does
    Trains a byte-level tokenizer on the training texts (or takes one), makes a Llama of random weights by one knob,
    model.depth (or of another model's architecture, model.config), and trains every weight to predict the next token.
    Special tokens of turns and tools are there from the start, so full_sft, lora_sft, dpo and ppo can follow.

Objective
    minimise  - (1 / N) * sum over tokens t of log p(token_t | tokens before t in the same text)
    Told as bits a byte of held-out text, which no choice of tokenizer changes: nats / (ln 2 * bytes of UTF-8).

Data in
    kind text: .txt files, rows with a text column, folders, Hub ids, several by weight; unset: tiny Shakespeare.

Artifact out
    model.safetensors, config.json, generation_config.json, tokenizer, chat template, report, card.

What to watch
    loss starts at ln(words of the vocabulary), falls at once, then ever more slowly. If it stays or jumps, the
    learning_rate is too high. If held-out loss rises while training loss falls, the text is too short for so many
    epochs or so large a model: `check` says tokens a parameter; about 20 make the best of the compute.

Paper
    GPT-2: Radford et al. 2019. Compute-optimal sizes: Hoffmann et al. 2022 (arXiv 2203.15556). Muon: Jordan 2024.
"""

from dataclasses import dataclass
from typing import ClassVar

from finetune_kit.data.load import load_data, training_texts
from finetune_kit.evaluation.evaluator import Evaluator
from finetune_kit.models.load import load_policy
from finetune_kit.models.new import NewModelConfig, check_shapes
from finetune_kit.models.new_tokenizer import TokenizerConfig, check_tokenizer, make_tokenizer
from finetune_kit.runs.save import Artifact, save
from finetune_kit.settings.schema import DataConfig, RecipeConfig, TrainConfig, section, setting
from finetune_kit.training.begin import begin
from finetune_kit.training.build import build
from finetune_kit.training.fit import fit


@dataclass
class Config(RecipeConfig):
    kind: ClassVar[str] = "text"
    trainer_config: ClassVar[str] = "trl.SFTConfig"
    model: NewModelConfig = section(NewModelConfig)
    tokenizer: TokenizerConfig = section(TokenizerConfig)
    # no chat: `generate` continues a text
    data: DataConfig = section(
        DataConfig, path="tiny_shakespeare", max_length=256, packing=False, apply_chat_template=False
    )
    train: TrainConfig = section(
        TrainConfig,
        optim="muon",
        learning_rate=1e-2,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        num_train_epochs=2,
        eval_steps=200,
    )
    sample_tokens: int = setting(
        48, "tokens by which a held-out text is continued at each eval_steps", within="[0, inf)"
    )

    def check_itself(self) -> None:
        check_tokenizer(self.tokenizer)
        check_shapes(self.model, self.data.max_length)


def run(config: Config) -> Artifact:
    from trl import SFTConfig, SFTTrainer

    texts = training_texts(config.data, seed=config.train.seed)
    tokenizer = make_tokenizer(config.tokenizer, config.model, texts, seed=config.train.seed)
    data = load_data(config.data, config.kind, tokenizer, seed=config.train.seed)
    policy = load_policy(config.model, trained_in_full=True)
    trainer = build(SFTTrainer, SFTConfig, config, policy, tokenizer, data)
    begin(config, tokenizer, data, policy)
    evaluator = Evaluator(tokenizer, data, config.evaluate, continues=config.sample_tokens)
    before = evaluator.measure(policy, "before")
    history = fit(trainer, config.train, evaluator.scores)
    after = evaluator.measure(trainer.model, "after")
    return save(trainer.model, tokenizer, config, data, evaluator.compare(before, after), history)
