"""PPO on the tiny model with its embeddings made larger, so that it is no longer unsure of everything."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from finetune_kit.data.load import Data, load_data
from finetune_kit.models.load import load_policy
from finetune_kit.models.tiny import write_tiny_model
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.recipe import folder as recipes
from finetune_kit.recipe import load
from finetune_kit.rewards.sources import Part, Rewards
from finetune_kit.rl.ppo import PPOTrainer
from finetune_kit.settings.load import resolve

torch.set_num_threads(1)

# questions of 1 to 18 bytes
ROWS = [{"prompt": f"{n} + {n * n} =" + " what?" * (n % 2)} for n in range(40)]
FAST = (
    "max_steps=2",
    "max_new_tokens=8",
    "batch_size=16",
    "num_mini_batches=2",
    "num_ppo_epochs=2",
    "per_device_train_batch_size=4",
    "learning_rate=1e-2",
    "missing_eos_penalty=0",
    "held_out_size=3",
    "evaluate.general_text=false",
    "evaluate.safety=null",
)


def write_home(folder: Path) -> Path:
    """A folder with `tiny`, its embeddings 4 times as large, and `rows.jsonl` of 40 questions."""
    write_tiny_model(folder / "tiny")
    model = AutoModelForCausalLM.from_pretrained(folder / "tiny")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(4)
    model.save_pretrained(folder / "tiny")
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    return folder


def lower(prompts: list[str], completions: list[str], records: list[Any]) -> list[float]:
    """The share of 8 characters that are small letters: about 0.1 of what a random model writes."""
    return [sum(letter.isascii() and letter.islower() for letter in text) / 8 for text in completions]


def settings(home: Path, *words: str) -> Any:
    """The recipe's settings, FAST unless `words` say otherwise."""
    given = {word.split("=")[0].rsplit(".", 1)[-1] for word in words}
    kept = [word for word in FAST if word.split("=")[0].rsplit(".", 1)[-1] not in given]
    places = [f"model.name_or_path={home / 'tiny'}", f"data.path={home / 'rows.jsonl'}", f"output_dir={home / 'run'}"]
    places = [word for word in places if word.split("=")[0].rsplit(".", 1)[-1] not in given]
    return resolve(load(str(recipes() / "ppo.py")).config_class, "ppo", None, [*places, *kept, *words])


def parts(config: Any) -> tuple[Any, Any, Data]:
    """(policy, tokenizer, data) of some settings."""
    tokenizer = load_tokenizer(config.model)
    data = load_data(config.data, "prompt", tokenizer, seed=config.train.seed)
    policy = load_policy(config.model, config.lora, seed=config.train.seed)
    return policy, tokenizer, data


def trainer(home: Path, *words: str, score: Callable[..., Any] = lower) -> PPOTrainer:
    config = settings(home, *words)
    policy, tokenizer, data = parts(config)
    return PPOTrainer(policy, tokenizer, data, Rewards((Part("lower", 1.0, score),)), config)


def weights(made: PPOTrainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in made.trained.items()}
