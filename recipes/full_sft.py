"""Full supervised fine-tuning: every weight learns the answers in your data.

What it does
    Continues training all weights of a causal language model on prompts with completions, on conversations, or on plain
    text. It learns only the assistant's words and the token that ends its turn; plain text is learned whole.

Objective
    minimise  - (1 / N) * sum over supervised tokens t of log p(token_t | tokens before t)
    N counts the supervised tokens of the whole global batch, however it is cut into micro-batches.

Data in
    kind prompt_completion or text: messages, ShareGPT, alpaca, question/answer, prompt/completion, tool calls, .txt.

Artifact out
    model.safetensors, config.json, generation_config.json, tokenizer, chat template, report, card.

What to watch
    loss falls quickly, then slowly. If it bounces or rises, the learning_rate is too high. If held-out loss rises while
    training loss falls, there are too many epochs. If general-text loss rises by more than a few percent, the model is
    forgetting: lower the learning_rate, or use lora_sft. If few answers end by themselves, the model hasn't learned the
    end token.

Paper
    Instruction tuning: Wei et al. 2021 (arXiv 2109.01652); Ouyang et al. 2022 (arXiv 2203.02155).
"""

from dataclasses import dataclass
from typing import ClassVar

from finetune_kit.data.load import load_data
from finetune_kit.evaluation.evaluator import Evaluator
from finetune_kit.generation.toolbox import toolbox_of
from finetune_kit.models.load import load_policy
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.runs.save import Artifact, save
from finetune_kit.settings.schema import ToolsRecipeConfig, TrainConfig, section
from finetune_kit.training.begin import begin
from finetune_kit.training.build import build
from finetune_kit.training.fit import fit


@dataclass
class Config(ToolsRecipeConfig):
    trainer_config: ClassVar[str] = "trl.SFTConfig"
    # a tenth of the rate that suits an adapter: every weight moves, so each needs to move less
    train: TrainConfig = section(TrainConfig, learning_rate=2e-5, warmup_steps=0.05, gradient_checkpointing=False)


def run(config: Config) -> Artifact:
    from trl import SFTConfig, SFTTrainer

    tokenizer = load_tokenizer(config.model)
    data = load_data(config.data, config.kind, tokenizer, seed=config.train.seed)
    policy = load_policy(config.model, trained_in_full=True)
    trainer = build(SFTTrainer, SFTConfig, config, policy, tokenizer, data)
    begin(config, tokenizer, data, policy)
    evaluator = Evaluator(tokenizer, data, config.evaluate, toolbox=toolbox_of(config))
    before = evaluator.measure(policy, "before")
    history = fit(trainer, config.train, evaluator.scores)
    after = evaluator.measure(trainer.model, "after")
    return save(trainer.model, tokenizer, config, data, evaluator.compare(before, after), history)
