"""A finished run's folder: open it, load what it holds, measure it again beside its base and other adapters."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune_kit import recipe as recipes
from finetune_kit.data.chat import end_token_ids
from finetune_kit.data.load import Data, load_data
from finetune_kit.errors import SecurityError, SettingsError
from finetune_kit.evaluation import harness
from finetune_kit.evaluation.compare import Report, compare
from finetune_kit.evaluation.guards import choice_sources
from finetune_kit.evaluation.loss import general_rows
from finetune_kit.evaluation.measure import Judge
from finetune_kit.evaluation.measure import measure as measure_model
from finetune_kit.evaluation.reward_gate import compare_rewards, measure_rewards
from finetune_kit.generation.toolbox import toolbox_of
from finetune_kit.models.adapter_config import read_adapter_config
from finetune_kit.models.adapters import as_started, detach
from finetune_kit.models.folder import check_files
from finetune_kit.models.load import load_adapted, load_base
from finetune_kit.models.new import NewModelConfig, settle
from finetune_kit.models.provenance import check_base
from finetune_kit.models.reward import is_classifier, load_saved, load_scorer
from finetune_kit.models.source import public_name
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.packing.forward import enable
from finetune_kit.rewards.settings import RewardConfig
from finetune_kit.rewards.sources import load_rewards
from finetune_kit.run_folder.naming import is_unfinished
from finetune_kit.runs.redact import is_here
from finetune_kit.runs.verify import PROBE, Proof, prove, release, sentence
from finetune_kit.settings import values
from finetune_kit.settings.aliases import near_path
from finetune_kit.settings.checks import check_own_tools
from finetune_kit.settings.load import recipe_of_yaml, resolve
from finetune_kit.settings.schema import BY_THE_USER, DataConfig, ModelConfig, RecipeConfig, TrainConfig
from finetune_kit.system.parsing import read_object
from finetune_kit.system.progress_bar import progress_bar
from finetune_kit.system.terminal import doing
from finetune_kit.system.versions import check_floors

log = logging.getLogger(__name__)

OF_ITS_BASE = ("model.name_or_path", "model.trust_remote_code")  # settings that may be overridden
TOOLS = ("tools", "max_tool_calls", "tool_timeout")  # and what answers may call
BASE = "base"  # its column among the adapters


@dataclass(frozen=True)
class FinishedRun:
    """A run's folder with the settings it was made with, and those of `evaluate` and `data` given now.

    `unseen`: what it was trained on and is not here, so that rows to measure on may be among them.
    """

    folder: Path
    config: RecipeConfig
    unseen: list[str] = field(default_factory=list)

    @property
    def is_adapter(self) -> bool:
        return (self.folder / "adapter_config.json").is_file()

    @property
    def is_reward_model(self) -> bool:
        """Its model scores answers and writes none."""
        if self.is_adapter:
            return is_classifier(read_adapter_config(self.folder))
        saved = self.folder / "config.json"
        return saved.is_file() and is_classifier(read_object(saved))


def open_run(folder: Path, words: list[str], recipe: str | None = None) -> FinishedRun:
    """Read a run's settings. `recipe`: the recipe's file, where the run was not made by a built-in one.

    Raises SettingsError where the folder is not a finished run, SecurityError where its run.yaml alone names a file.
    """
    check_floors()
    if folder.is_dir():
        check_files(folder)
    if not (folder / "run.yaml").is_file():
        raise SettingsError(
            f"{folder} is not a run's folder: it has no run.yaml.",
            f"{'' if folder.is_dir() else near_path(str(folder))}A run is made by: python -m finetune_kit run RECIPE",
        )
    if is_unfinished(folder):
        raise SettingsError(
            f"{folder} is a run that has not finished.", f"Continue: python -m finetune_kit run {folder / 'run.yaml'}"
        )
    if not any(folder.glob("*.safetensors")):
        raise SettingsError(f"{folder} is a run that has not finished: it holds no weights.")
    for word in words:
        if word.split(".")[0] not in ("data", "evaluate") and word.split("=")[0] not in (
            *OF_ITS_BASE,
            "reward.sources",
            *TOOLS,
        ):
            raise SettingsError(
                f"{word} has no effect on a finished run.",
                "Only data.… and evaluate.… settings act here, reward.sources, tools, and model.name_or_path where its "
                "base has moved.",
            )
    made_by, settings = _recipe_of(folder, recipe), folder / "run.yaml"
    config = resolve(made_by.config_class, made_by.word, settings, words)
    if config.origins.get("data.path") in BY_THE_USER:
        # the rows to measure on; the rows trained on stay known, so that an overlap is found
        trained = resolve(made_by.config_class, made_by.word, settings)
        if not isinstance(config.data.path, str):
            raise SettingsError("data.path: expected one path to measure on, found a list.")
        if config.origins.get("data.held_out_path") in BY_THE_USER:
            raise SettingsError("data.path and data.held_out_path are both rows to measure on.", "Give one of them.")
        config.data.held_out_path, config.data.path = config.data.path, trained.data.path
        if config.origins.get("data.held_out_size") not in BY_THE_USER:
            config.data.held_out_size = None  # it was the size of the run's own held-out rows
        here = _those_here(config.data.path)
        unseen = [path for path in _listed(config.data.path) if path not in here]
        config.data.path = here
        return FinishedRun(folder, config, unseen)
    return FinishedRun(folder, config)


def moved_base(base: str | None) -> list[str]:
    """The words of `open_run` for a run whose base is elsewhere now."""
    return [f"model.name_or_path={base}"] if base else []


def _those_here(paths: str | list[str]) -> list[str]:
    """Of the places that a run was trained on those that can be read: a pushed run names its files as ./name."""
    return [path for path in _listed(paths) if is_here(path) or not path.startswith("./")]


def _listed(paths: str | list[str]) -> list[str]:
    return [paths] if isinstance(paths, str) else paths


def tokenizer_of(run: FinishedRun) -> Any:
    """The tokenizer that the run saved, with the chat template it was trained with. A run that began from random
    weights gets to know what makes them again."""
    tokenizer = load_tokenizer(run.config.model, saved=run.folder)
    model = run.config.model
    settle(model, tokenizer, run.config.train.seed)
    if isinstance(model, NewModelConfig) and model.config is not None:  # the shapes that it took are in its folder
        model.config, model.revision = str(run.folder), None
    return tokenizer


def own_model(run: FinishedRun) -> ModelConfig:
    """What to load before any adapter: the run's base, or the run's own weights where all of them were trained."""
    return (
        run.config.model if run.is_adapter else replace(run.config.model, name_or_path=str(run.folder), revision=None)
    )


def model_of(run: FinishedRun) -> Any:
    """The run's model; an adapter is on its base and can be switched off."""
    return load_adapted(run.config.model, run.folder) if run.is_adapter else load_base(own_model(run))


def _recipe_of(folder: Path, named: str | None) -> recipes.Recipe:
    """The recipe that made a run: a built-in one, or the file that the user names now. A folder may come from somebody
    else, so its run.yaml alone leads to no file, wherever that lies."""
    wrote = recipe_of_yaml(folder / "run.yaml")
    if wrote in recipes.BUILTIN:
        if named is not None and recipes.load(named).word != wrote:
            raise SettingsError(f"--recipe {named}: {folder} was made by {wrote}.", "Leave --recipe out.")
        return recipes.load(wrote)
    if named is None:
        raise SecurityError(
            f"{folder / 'run.yaml'} names the recipe {wrote}, which would be run as code.",
            "Name that file yourself, if you have read it: --recipe FILE.py",
        )
    if Path(named).stem != Path(wrote).stem:
        raise SettingsError(f"--recipe {named}: {folder} was made by {wrote}.", "Name the file that made it.")
    return recipes.load(named)


def _refuse_its_metrics(run: FinishedRun) -> None:
    """The same for metric scripts: whoever measures a run names them."""
    named = run.config.evaluate.hub_metrics
    if named and run.config.origins.get("evaluate.hub_metrics") not in BY_THE_USER:
        raise SecurityError(
            f"{run.folder / 'run.yaml'} names metric scripts that would be fetched and run: {', '.join(named)}.",
            f"Say that you trust them: evaluate.hub_metrics=[{','.join(named)}], or leave them out: "
            "evaluate.hub_metrics=[]",
        )


def check_writes(run: FinishedRun) -> None:
    """Raises SettingsError for a run whose model scores answers and writes none."""
    if run.is_reward_model:
        raise SettingsError(
            f"{run.folder} is a reward model: it scores answers and writes none.",
            f"Measure it: python -m finetune_kit evaluate {run.folder}, or train a policy against it: run ppo",
        )


def compare_run(run: FinishedRun) -> Report:
    """The run's model against what it started from on the held-out rows: its base, or the adapter it continued from."""
    _refuse_its_metrics(run)
    check_own_tools(run.config)
    if run.is_reward_model:
        return _compare_rewards(run)
    config = run.config
    toolbox = toolbox_of(config)
    tokenizer = tokenizer_of(run)
    data = load_data(config.data, config.kind, tokenizer, seed=config.train.seed)
    if run.is_adapter:
        model = _shares_beginnings(run, model_of(run))
        judge = _judge(run, data, model)
        with as_started(model, config.lora.init_from if config.lora else None):
            before = measure_model(
                model, tokenizer, data, config.evaluate, progress_bar("before"), judge=judge, toolbox=toolbox
            )
    else:  # one after the other, in the types of training
        judge = _judge(run, data)
        base = _shares_beginnings(run, load_base(config.model, trained_in_full=True))
        before = measure_model(
            base, tokenizer, data, config.evaluate, progress_bar("before"), judge=judge, toolbox=toolbox
        )
        del base
        release()
        model = _shares_beginnings(run, load_base(own_model(run), trained_in_full=True))
    after = measure_model(model, tokenizer, data, config.evaluate, progress_bar("after"), judge=judge, toolbox=toolbox)
    return compare(before, after, config.evaluate, config.beta)


def compare_tasks(run: FinishedRun, asked: harness.Asked) -> Report:
    """The run's model against what it started from on tasks of lm-evaluation-harness, the same rows for both.

    Raises as `harness.check` and `harness.run_tasks`.
    """
    check_writes(run)
    config, tokenizer = run.config, tokenizer_of(run)
    size = config.evaluate.batch_size
    if run.is_adapter:
        model = model_of(run)
        with as_started(model, config.lora.init_from if config.lora else None), doing("base: tasks"):
            before = harness.run_tasks(model, tokenizer, asked, size)
    else:
        base = load_base(config.model, trained_in_full=True)
        with doing("base: tasks"):
            before = harness.run_tasks(base, tokenizer, asked, size)
        del base
        release()
        model = load_base(own_model(run), trained_in_full=True)
    with doing("tuned: tasks"):
        after = harness.run_tasks(model, tokenizer, asked, size)
    return harness.report(before, after, asked, config.evaluate)


def _shares_beginnings(run: FinishedRun, model: Any) -> Any:
    """The model, packing its rows where it is to choose among answers: a question is then computed once for all."""
    evaluate = run.config.evaluate
    if run.config.train.padding_free and (choice_sources(evaluate) or evaluate.fairness):
        enable(model)
    return model


def _judge(run: FinishedRun, data: Data, policy: Any = None) -> Judge | None:
    """What scored the run's answers, beside the data's own scores: the rewards it was trained for. None where it has
    none, where evaluate.reward_model takes their place, and, with a warning, where one of them is not here.

    `policy`: see rl.rewards.load_rewards. A folder may come from somebody else: its run.yaml alone has no function run.
    """
    config = run.config
    reward = config.reward
    if not isinstance(reward, RewardConfig) or config.evaluate.reward_model or not config.evaluate.size:
        return None
    functions = [source for source in reward.sources if source.rpartition(":")[0].endswith(".py")]
    if functions and config.origins.get("reward.sources") not in BY_THE_USER:
        log.warning(
            "answers are measured without %s, which run.yaml names, not you; if you trust it: reward.sources=[%s]",
            ", ".join(functions),
            ",".join(reward.sources),
        )
        return None
    try:
        return load_rewards(reward, data, config.model, policy).judge
    except SettingsError as error:
        log.warning("answers are measured without the rewards that the run was trained for: %s", error.message)
        return None


def _compare_rewards(run: FinishedRun) -> Report:
    """The run's scores against those of its base, without any adapter, under the random head of the run's seed."""
    config, tokenizer = run.config, tokenizer_of(run)
    data = load_data(config.data, config.kind, tokenizer, seed=config.train.seed)
    head = (tokenizer, data.end_token_ids, config.train.seed)
    if run.is_adapter:
        model = load_saved(config.model, run.folder, *head)
        with model.disable_adapter():
            before = measure_rewards(model, tokenizer, data, config.evaluate, progress_bar("before"))
    else:
        base = load_scorer(config.model, *head, trained_in_full=True)
        before = measure_rewards(base, tokenizer, data, config.evaluate, progress_bar("before"))
        del base
        release()
        model = load_scorer(own_model(run), *head, trained_in_full=True)
    after = measure_rewards(model, tokenizer, data, config.evaluate, progress_bar("after"))
    return compare_rewards(before, after, data, config.evaluate)


def verify_run(run: FinishedRun) -> Proof:
    """Prove once more, or for the first time, that a fresh process gives with plain transformers and PEFT what this
    package gives with the run's folder, and write that into its report and card.

    Raises NumericsError where it gives something else.
    """
    config, tokenizer = run.config, tokenizer_of(run)
    if run.is_reward_model:
        ends = end_token_ids(tokenizer, config.data.chat_template_kwargs)
        model = load_saved(config.model, run.folder, tokenizer, ends, config.train.seed)
    else:
        model = model_of(run) if run.is_adapter else load_base(own_model(run), trained_in_full=True)
    probe = list(general_rows(tokenizer)[0][0][:PROBE])
    with doing("a fresh process loads it, and must give the same outputs"):
        proof = prove(model, config.model, run.folder, probe)
    path, card = run.folder / "report.json", run.folder / "README.md"
    results = read_object(path)
    told = {**results, **proof.to_json()}
    beside = run.folder / ".report.json.new"
    beside.write_text(json.dumps(told, indent=1, ensure_ascii=False), encoding="utf-8")
    beside.replace(path)
    if card.is_file() and "reload" in results:
        try:
            was = sentence(results)
        except (TypeError, KeyError, ValueError):
            raise SettingsError(f"{path} is not a run's report: what it says of a proof is not whole.") from None
        text = card.read_text(encoding="utf-8").replace(was, sentence(told))
        card.write_text(text, encoding="utf-8")
    return proof


@dataclass
class Adapters:
    """Several adapters against the one base they share, on the same rows; each name leads to its report."""

    base: str
    reports: dict[str, Report] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Numbers, texts, lists and dicts only."""
        adapters = {name: report.to_json() for name, report in self.reports.items()}
        return {"base": self.base, "notes": self.notes, "adapters": adapters}


def compare_adapters(run: FinishedRun, folders: list[Path]) -> Adapters:
    """The run's adapter and those in `folders` (runs, or plain PEFT adapters) against their base, which is measured
    once. A run that trained all weights is itself the base.

    Everything is measured on the run's held-out rows, with its tokenizer and template. Raises SettingsError for an
    adapter that is none, or that was made for another base.
    """
    check_writes(run)
    _refuse_its_metrics(run)
    check_own_tools(run.config)
    columns = _columns(run, folders)
    for folder in columns.values():
        check_adapter(folder)
    config, tokenizer, base = run.config, tokenizer_of(run), own_model(run)
    data = load_data(config.data, config.kind, tokenizer, seed=config.train.seed)
    model = load_base(base)
    for folder in columns.values():
        check_base(base, folder)  # before the long part
    rows = model.get_input_embeddings().weight.shape[0]
    toolbox = toolbox_of(config)
    before = measure_model(model, tokenizer, data, config.evaluate, progress_bar(BASE), toolbox=toolbox)
    compared = Adapters(public_name(base.name_or_path), notes=_other_data(run, folders))
    for name, folder in columns.items():
        adapted = load_adapted(base, folder, model)
        after = measure_model(adapted, tokenizer, data, config.evaluate, progress_bar(name), toolbox=toolbox)
        compared.reports[name] = compare(before, after, config.evaluate, config.beta)
        model = detach(adapted)
        if model.get_input_embeddings().weight.shape[0] != rows:  # this adapter's run had made the vocabulary longer
            model = load_base(base)
    return compared


def _columns(run: FinishedRun, folders: list[Path]) -> dict[str, Path]:
    """{name for people: adapter folder}: the folder's own name, or its path where another one has that name, too."""
    every = [*([run.folder] if run.is_adapter else []), *folders]
    resolved = [folder.resolve() for folder in every]
    twice = next((folder for folder in resolved if resolved.count(folder) > 1), None)
    if twice is not None:
        own = " The run's own adapter is measured anyway." if run.is_adapter and twice == run.folder.resolve() else ""
        raise SettingsError(f"--adapter: {twice} is given twice.{own}", "Give each adapter once.")
    names = [folder.name for folder in resolved]
    return {
        str(folder) if names.count(name) > 1 or name == BASE else name: folder
        for folder, name in zip(every, names, strict=True)
    }


def check_adapter(folder: Path) -> None:
    """Raises SettingsError for a folder without an adapter in it, SecurityError for one whose weights are a pickle."""
    if not (folder / "adapter_config.json").is_file():
        raise SettingsError(
            f"{folder} is not an adapter: it has no adapter_config.json.", "Give the folder of an adapter."
        )
    read_adapter_config(folder)
    if not (folder / "adapter_model.safetensors").is_file():
        if (folder / "adapter_model.bin").is_file():
            raise SecurityError(
                f"{folder} has its weights as a pickle (adapter_model.bin), which can run code when it is read.",
                "Get the adapter as safetensors.",
            )
        raise SettingsError(f"{folder} holds no adapter_model.safetensors.", "Was its run finished?")


def _other_data(run: FinishedRun, folders: list[Path]) -> list[str]:
    """Which adapters were trained on other rows, or on other tokens, than this run: where a comparison is not fair."""
    notes = []
    mine = _data_settings(run.folder)
    for folder in folders:
        if (folder / "run.yaml").is_file():
            theirs = _data_settings(folder)
            differing = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
            if differing:
                notes.append(
                    f"{folder} was trained with another {', '.join(differing)}: it may have seen rows that "
                    "are measured here, or have learned them written otherwise."
                )
    return notes


def _data_settings(folder: Path) -> dict[str, Any]:
    """What decides which rows a run was trained on, and as which tokens; read without its recipe."""
    written = values.load_file(folder / "run.yaml")
    data, train = (written.get(name) or {} for name in ("data", "train"))
    if not isinstance(data, dict) or not isinstance(train, dict):
        raise SettingsError(f"{folder / 'run.yaml'} is not a run's: data and train have to hold settings.")
    kept = {f"data.{name}": value for name, value in {**asdict(DataConfig()), **data}.items()}
    kept["train.seed"] = train.get("seed", TrainConfig.seed)
    for harmless in ("data.size", "data.weights", "data.max_length", "data.packing", "data.train_on", "data.max_lost"):
        del kept[harmless]
    return kept
