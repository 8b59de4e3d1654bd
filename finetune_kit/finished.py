"""Work with a finished run's folder: measure it again, or ask it something."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_kit import recipe as recipes
from finetune_kit.config import RecipeConfig, resolve
from finetune_kit.data.chat import end_token_ids, render_prompt
from finetune_kit.data.load import load_data
from finetune_kit.errors import SettingsError
from finetune_kit.evaluation.compare import Report, compare
from finetune_kit.evaluation.compare import measure as measure_model
from finetune_kit.model.adapters import load_adapter
from finetune_kit.model.load import load_base, load_tokenizer

if TYPE_CHECKING:
    from finetune_kit.generation import Completion


@dataclass(frozen=True)
class FinishedRun:
    """A run's folder with the settings it was made with, and those of `evaluate` and `data` given now."""

    folder: Path
    config: RecipeConfig

    @property
    def is_adapter(self) -> bool:
        return (self.folder / "adapter_config.json").is_file()


def open_run(folder: Path, words: list[str]) -> FinishedRun:
    """Read a run's settings. Raises SettingsError where the folder is no finished run."""
    if not (folder / "run.yaml").is_file():
        raise SettingsError(
            f"{folder} is no run's folder: it has no run.yaml.", "A run is made by: finetune_kit run RECIPE"
        )
    if not any(folder.glob("*.safetensors")):
        raise SettingsError(f"{folder} is a run that has not finished: it holds no weights.")
    for word in words:
        if word.split(".")[0] not in ("data", "evaluate"):
            raise SettingsError(
                f"{word} has no effect on a finished run.", "Only data.… and evaluate.… settings act here."
            )
    recipe = recipes.load(str(folder / "run.yaml"))
    config = resolve(recipe.config_class, recipe.name, recipe.settings, words)
    if config.origins.get("data.path") == "command line":
        # the rows to measure on; the rows trained on stay known, so that an overlap is found
        trained = resolve(recipe.config_class, recipe.name, recipe.settings)
        config.data.held_out_path, config.data.path = str(config.data.path), trained.data.path
    return FinishedRun(folder, config)


def compare_run(run: FinishedRun) -> Report:
    """The run's model against its base on the held-out rows."""
    config = run.config
    tokenizer = _tokenizer(run)
    data = load_data(config.data, "prompt_completion", tokenizer, seed=config.train.seed)
    if run.is_adapter:
        model: Any = load_adapter(load_base(config.model), str(run.folder))
        with model.disable_adapter():
            before = measure_model(model, tokenizer, data, config.evaluate)
    else:
        before = measure_model(load_base(config.model), tokenizer, data, config.evaluate)
        model = _model(run)
    return compare(before, measure_model(model, tokenizer, data, config.evaluate), config.evaluate)


def answer(run: FinishedRun, prompt: str, max_new_tokens: int) -> Completion:
    """The run's greedy answer to one prompt, from the same tokens as in training."""
    from finetune_kit.generation import generate

    tokenizer, kwargs = _tokenizer(run), run.config.data.chat_template_kwargs
    messages = [{"role": "user", "content": prompt}]
    if run.config.data.system_prompt:
        messages.insert(0, {"role": "system", "content": run.config.data.system_prompt})
    ids = render_prompt(tokenizer, messages, None, kwargs)
    ends = end_token_ids(tokenizer, kwargs)
    return generate(_model(run), tokenizer, [ids], max_new_tokens=max_new_tokens, end_token_ids=ends)[0]


def _tokenizer(run: FinishedRun) -> Any:
    return load_tokenizer(replace(run.config.model, name_or_path=str(run.folder), revision=None))


def _model(run: FinishedRun) -> Any:
    if run.is_adapter:
        return load_adapter(load_base(run.config.model), str(run.folder))
    return load_base(replace(run.config.model, name_or_path=str(run.folder), revision=None))
