"""Run recipes and use what they leave from Python: for notebooks and other programs.

    import finetune_kit as ft

    run = ft.run("dpo", data={"path": "pairs.jsonl"}, beta=0.2, output_dir="runs/mine")
    run = ft.open_run("runs/mine")

Settings are those of the command line (`python -m finetune_kit show dpo`), as keywords: a setting by its own name, or a
section as a dict. A mistake raises FinetuneKitError; its text says what was found, what was expected and what fixes it.
"""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from finetune_kit import recipe as recipes
from finetune_kit.errors import SettingsError
from finetune_kit.run_folder.claim import claim
from finetune_kit.run_folder.lineage import start_from_run
from finetune_kit.settings.checks import check_code
from finetune_kit.settings.load import resolve
from finetune_kit.settings.schema import KEYWORD, RecipeConfig
from finetune_kit.system.parsing import parse, read_object
from finetune_kit.system.terminal import quiet_libraries
from finetune_kit.system.versions import check_floors


class Report(dict[str, Any]):
    """The content of report.json as a dict. In a notebook it shows the run's report.html."""

    def __init__(self, content: Mapping[str, Any], page: Path | None = None) -> None:
        super().__init__(content)
        self.page = page

    def _repr_html_(self) -> str | None:
        if self.page is None or not self.page.is_file():
            return None
        text = html.escape(self.page.read_text(encoding="utf-8"), quote=True)
        return f'<iframe srcdoc="{text}" style="width: 100%; height: 640px; border: 0" title="Report"></iframe>'


class Run:
    """A finished run: what its folder holds, and its model.

    `folder` is its place. Weights are loaded when they are first needed, and kept.
    """

    def __init__(self, folder: str | Path, *, recipe: str | None = None, base: str | None = None) -> None:
        from finetune_kit.runs.saved import moved_base
        from finetune_kit.runs.saved import open_run as read_run

        self.folder = Path(folder)
        self._recipe, self._base = recipe, base
        self._finished = read_run(self.folder, moved_base(base), recipe)
        self._model: Any = None

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}): {self.report['verdict']}"

    def _repr_html_(self) -> str | None:
        return self.report._repr_html_()

    @property
    def settings(self) -> RecipeConfig:
        """The settings that it was made with."""
        return self._finished.config

    @property
    def report(self) -> Report:
        """Before and after on the same held-out rows."""
        return Report(read_object(self.folder / "report.json"), self.folder / "report.html")

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The report's metrics, a dict each: name, before, after, difference, interval, n, verdict."""
        return list(self.report["metrics"])

    @property
    def samples(self) -> list[dict[str, Any]]:
        """Held-out rows with the answers before and after, a dict each; `pandas.DataFrame(run.samples)` is a table."""
        return list(self.report["samples"])

    @property
    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, a dict a logged step."""
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [cast(dict[str, Any], parse(line, strict=False)) for line in lines if line.strip()]

    def generate(
        self,
        prompts: str | Sequence[Mapping[str, Any]] | Sequence[str | Sequence[Mapping[str, Any]]],
        *,
        system: str | None = None,
        batch_size: int = 32,
        **decoding: Any,
    ) -> str | list[str]:
        """The answer to a prompt, or the answers to a list of them.

        A prompt is a text, or a conversation: a list of {"role", "content"} that waits for an answer. `system`: a
        system turn in place of the run's own. `decoding`: max_new_tokens, temperature, top_p, top_k, min_p,
        repetition_penalty, seed, stop. Greedy where none of those that sample is given. Raises SettingsError (a setting
        out of range), DataError (a prompt that the run's template cannot write, or too long for the model).
        """
        from finetune_kit.runs import answering

        if batch_size < 1:
            raise SettingsError(f"generate: batch_size={batch_size}; expected 1 or more.")
        stop = decoding.get("stop") or ()
        given = decoding | {"stop": (stop,) if isinstance(stop, str) else tuple(stop)}
        known = {field.name for field in dataclasses.fields(answering.Decoding)}
        if unknown := sorted(set(given) - known):
            raise SettingsError(f"generate: no setting {unknown[0]}.", f"Known: {', '.join(sorted(known))}")
        asked = answering.prepare(self._finished, answering.Decoding(**given), system)
        one = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], Mapping))
        texts = [prompts] if one else list(prompts)
        ids = [answering.prompt_ids(asked, _conversation(text)) for text in texts]
        if self._model is None:
            self._model = answering.load(asked).model
        asked = dataclasses.replace(asked, model=self._model)
        found: list[str] = []
        for start in range(0, len(ids), batch_size):
            batch = answering.answers(asked, ids[start : start + batch_size], shift=start)
            found += [completion.text for completion in batch]
        return found[0] if one else found

    def evaluate(self, **settings: Any) -> Report:
        """Measure it again beside its base: on its own held-out rows, or with evaluate.… and data.… settings as for
        `run`, such as data={"path": "other.jsonl"}. Nothing in the folder changes."""
        from finetune_kit.runs.saved import compare_run, moved_base
        from finetune_kit.runs.saved import open_run as read_run

        words = [*moved_base(self._base), *_words(type(self.settings), settings)]
        return Report(compare_run(read_run(self.folder, words, self._recipe)).to_json())

    def merge(self, target: str | Path, *, candidate: str = "auto", max_shard_size: str = "5GB") -> Path:
        """Write the adapter merged into its base as a plain model, proven by a fresh process; its folder."""
        from finetune_kit.runs.merge import merge

        return merge(self.folder, Path(target), candidate, max_shard_size, None, self._recipe, self._base).folder

    def push(self, repo_id: str, *, private: bool = True, message: str | None = None) -> str:
        """Push it to the Hugging Face Hub, as one commit; the repository's address."""
        from finetune_kit.run_folder import upload
        from finetune_kit.runs import hub

        prepared = hub.prepare(self.folder, repo_id, self.settings, private=private)
        upload.check_access(repo_id, private)
        return upload.send(prepared, message)


def _conversation(prompt: Any) -> list[Any]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]


def run(recipe: str | Path, *, config: str | Path | None = None, **settings: Any) -> Run:
    """Train by a recipe, and measure what it changed.

    `recipe`: a built-in's name, or the path of a recipe or a settings file. `config`: a YAML file with settings.
    `settings`: the recipe's, each by its own name or as a section: learning_rate=1e-4, data={"path": "mine.jsonl"}.
    An unfinished run of the same settings resumes; hub={"push": True, …} pushes the result. Raises FinetuneKitError.
    """
    from finetune_kit.runs.train import train

    loaded, resolved = _read(recipe, config, settings)
    claim(resolved)
    artifact = train(loaded, resolved)
    if resolved.hub.push:
        from finetune_kit.runs.hub import push_run

        push_run(artifact.folder, resolved)
    return Run(artifact.folder, recipe=None if loaded.word in recipes.BUILTIN else str(loaded.path))


def open_run(
    folder: str | Path,
    *,
    recipe: str | Path | None = None,
    revision: str | None = None,
    base: str | Path | None = None,
) -> Run:
    """A finished run: its folder, or the user/name that it was pushed to.

    `recipe`: the recipe's file, where it was no built-in's. `base`: its base, where that is elsewhere now. Raises
    SettingsError, ResourceError.
    """
    from finetune_kit.runs.hub import folder_of

    return Run(
        folder_of(str(folder), revision),
        recipe=None if recipe is None else str(recipe),
        base=None if base is None else str(base),
    )


def load_settings(recipe: str | Path, *, config: str | Path | None = None, **settings: Any) -> Any:
    """A recipe's settings, checked, for a program that goes the recipe's steps itself; its folder is claimed.

    Arguments as of `run`. The result is the recipe's Config: `settings.model`, `settings.train.seed`.
    """
    _, resolved = _read(recipe, config, settings)
    resolved.check_itself()
    claim(resolved)
    return resolved


def _read(
    recipe: str | Path, config: str | Path | None, settings: dict[str, Any]
) -> tuple[recipes.Recipe, RecipeConfig]:
    quiet_libraries()
    check_floors()
    loaded = recipes.load(str(recipe))
    if loaded.settings and config:
        raise SettingsError(f"{recipe} and config={config} are both settings files.", "Give one of them.")
    file = Path(config) if config else loaded.settings
    resolved = resolve(loaded.config_class, loaded.word, file, _words(loaded.config_class, settings), KEYWORD)
    check_code(resolved)
    start_from_run(resolved)
    return loaded, resolved


def _words(config_class: type[RecipeConfig], settings: Mapping[str, Any]) -> list[str]:
    """Keywords as the `key=value` words of the command line, which has one loader for both."""
    blank = config_class()
    words = []
    for name, value in settings.items():
        if isinstance(value, Mapping) and dataclasses.is_dataclass(getattr(blank, name, None)):
            words += [_word(f"{name}.{leaf}", inner) for leaf, inner in value.items()]
        else:
            words.append(_word(name, value))
    return words


def _word(key: str, value: Any) -> str:
    try:
        return f"{key}={json.dumps(value, default=_plain, ensure_ascii=False)}"
    except TypeError:
        raise SettingsError(
            f"{key}: a {type(value).__name__} is not a setting.",
            "Expected a number, a text, a list or a dict of these.",
        ) from None


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):  # a number of numpy's or torch's
        return value.item()
    raise TypeError
