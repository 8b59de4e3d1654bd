"""finetune_kit: from a base model to an aligned one, with proof that it got better, in one command.

    import finetune_kit as ft

    run = ft.run("lora_sft", data={"path": "mine.jsonl"}, learning_rate=2e-4)
    run.report                       # before and after; in a notebook it shows itself
    run.generate("What is 3 + 4?")

The names of `__all__` are the public API (docs/api.md). Importing the package imports neither torch nor transformers:
each name is loaded when it is first asked for.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

# Read once, when torch and the Hub's client are imported, so they must be set before either.
# OpenMP threads that spin at a barrier make a step 4 to 8 times slower as soon as another process wants the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# TRL and transformers report each trainer they build; nothing leaves the machine unless the user asks for it.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from finetune_kit.api import Run, load_settings, open_run, run
    from finetune_kit.data.load import Data, load_data
    from finetune_kit.errors import FinetuneKitError
    from finetune_kit.evaluation.evaluator import Evaluator
    from finetune_kit.models.load import load_policy
    from finetune_kit.models.reward import load_reward_model
    from finetune_kit.models.tokenizer import load_tokenizer
    from finetune_kit.rewards.sources import load_rewards
    from finetune_kit.rl.ppo import PPOTrainer
    from finetune_kit.runs.save import Artifact, save
    from finetune_kit.training.begin import begin
    from finetune_kit.training.build import build
    from finetune_kit.training.fit import fit

__all__ = [
    "Artifact",
    "Data",
    "Evaluator",
    "FinetuneKitError",
    "PPOTrainer",
    "Run",
    "begin",
    "build",
    "fit",
    "load_data",
    "load_policy",
    "load_reward_model",
    "load_rewards",
    "load_settings",
    "load_tokenizer",
    "open_run",
    "run",
    "save",
]

_HOME = {
    "api": ("Run", "load_settings", "open_run", "run"),
    "data.load": ("Data", "load_data"),
    "errors": ("FinetuneKitError",),
    "evaluation.evaluator": ("Evaluator",),
    "models.load": ("load_policy",),
    "models.reward": ("load_reward_model",),
    "models.tokenizer": ("load_tokenizer",),
    "rewards.sources": ("load_rewards",),
    "rl.ppo": ("PPOTrainer",),
    "runs.save": ("Artifact", "save"),
    "training.begin": ("begin",),
    "training.build": ("build",),
    "training.fit": ("fit",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"finetune_kit.{module}"), name)
    raise AttributeError(f"module 'finetune_kit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
