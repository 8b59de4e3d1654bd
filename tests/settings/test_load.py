"""Settings: who wins, where each came from, and what is said about a name or a value that cannot be."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from finetune_kit import recipe as recipes
from finetune_kit.errors import SecurityError, SettingsError
from finetune_kit.settings.aliases import KNOWN_ELSEWHERE
from finetune_kit.settings.checks import check
from finetune_kit.settings.load import recipe_of_yaml, resolve, to_yaml
from finetune_kit.settings.schema import SECTIONS, LoraConfig, ModelConfig, RecipeConfig, leaves, section, setting

BATCH = "train.per_device_train_batch_size"


@dataclass
class Config(RecipeConfig):
    """Like lora_sft, with a setting of the recipe's own."""

    lora: LoraConfig = section(LoraConfig, r=4)
    beta: float = setting(0.1, "how far from the reference", within="[0, inf)")


def resolved(*words: str, yaml_text: str | None = None, folder: Path | None = None) -> Any:
    file = None
    if yaml_text is not None and folder is not None:
        file = folder / "mine.yaml"
        file.write_text(yaml_text, encoding="utf-8")
    return resolve(Config, "lora_sft", file, words)


def refusal(*words: str, yaml_text: str | None = None, folder: Path | None = None) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        resolved(*words, yaml_text=yaml_text, folder=folder)
    return caught.value


# precedence and origins


def test_recipe_then_yaml_then_command_line_and_each_value_says_where_it_came_from(tmp_path: Path) -> None:
    text = "# mine\nlora:\n  r: 8\n  lora_alpha: 16\nbeta: 0.5\n"
    config = resolved("lora.r=32", yaml_text=text, folder=tmp_path)
    assert (config.lora.r, config.lora.lora_alpha, config.beta, config.train.seed) == (32, 16, 0.5, 0)
    file = tmp_path / "mine.yaml"
    assert config.origins == {"lora.r": "command line", "lora.lora_alpha": f"{file}:4", "beta": f"{file}:5"}


def test_the_recipe_s_own_default_stands_where_nobody_says_otherwise() -> None:
    config = resolved()
    assert config.lora.r == 4
    assert LoraConfig().r != 4
    assert config.origins == {}


def test_the_last_of_two_equal_words_wins() -> None:
    assert resolved("seed=1", "seed=2").train.seed == 2


@pytest.mark.parametrize("spelling", ["train.learning_rate", "learning_rate", "train.learning-rate", "learning-rate"])
def test_a_name_that_only_one_section_has_may_be_given_bare_and_with_dashes(spelling: str) -> None:
    assert resolved(f"{spelling}=0.25").train.learning_rate == 0.25


def test_bare_names_work_in_yaml_too(tmp_path: Path) -> None:
    config = resolved(yaml_text="learning_rate: 0.25\nr: 2\n", folder=tmp_path)
    assert (config.train.learning_rate, config.lora.r) == (0.25, 2)


def test_a_name_that_two_sections_have_must_say_which_one() -> None:
    error = refusal("revision=main")
    assert "model.revision or data.revision" in error.message


def test_a_section_that_only_this_recipe_has_is_read_from_yaml_and_words(tmp_path: Path) -> None:
    @dataclass
    class TwoModels(RecipeConfig):
        reward: ModelConfig = section(ModelConfig)

    (tmp_path / "two.yaml").write_text("reward:\n  name_or_path: one\nmodel: {name_or_path: other}\n")
    config: Any = resolve(TwoModels, "two", tmp_path / "two.yaml", ["reward.revision=main"])
    assert (config.reward.name_or_path, config.reward.revision, config.model.name_or_path) == ("one", "main", "other")


def test_an_empty_yaml_file_changes_nothing(tmp_path: Path) -> None:
    assert resolved(yaml_text="# nothing yet\n", folder=tmp_path).origins == {}


# values


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4", "+1e-4", ".1e-3"])
def test_1e_4_is_a_number_on_the_command_line_and_in_yaml(text: str, tmp_path: Path) -> None:
    assert resolved(f"learning_rate={text}").train.learning_rate == 1e-4
    assert resolved(yaml_text=f"train:\n  learning_rate: {text}\n", folder=tmp_path).train.learning_rate == 1e-4
    assert resolved(f"train.extra.adam_epsilon={text}").train.extra == {"adam_epsilon": 1e-4}
    in_yaml = resolved(yaml_text=f"train: {{extra: {{adam_epsilon: {text}}}}}\n", folder=tmp_path)
    assert in_yaml.train.extra == {"adam_epsilon": 1e-4}


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("max_steps=1e3", 1000),
        ("seed=4294967295", 4294967295),
        ("max_steps=1_000", 1000),
        ("gradient_checkpointing=true", True),
        ("gradient_checkpointing=False", False),
        ("gradient_checkpointing=yes", True),
        ("data.packing=null", None),
        ("data.packing=None", None),
        ("data.packing=", None),
        ("data.packing=false", False),
        ("data.path=[a.jsonl, b.jsonl]", ["a.jsonl", "b.jsonl"]),
        ("data.path=a.jsonl", "a.jsonl"),
        ("weights=[1, 2e0]", [1.0, 2.0]),
        ("report_to=tensorboard", ["tensorboard"]),
        ("report_to=[]", []),
        ("data.columns={theirs: question, other: answer}", {"theirs": "question", "other": "answer"}),
        ("data.columns.my-own.column=question", {"my-own.column": "question"}),
        ("data.options={min_words: 3, words: [a, b]}", {"min_words": 3, "words": ["a", "b"]}),
        ("chat_template_kwargs={enable_thinking: false}", {"enable_thinking": False}),
        ("dtype=float32", "float32"),
    ],
)
def test_words_become_what_the_setting_is(word: str, found: Any) -> None:
    config = resolved(word)
    name = word.split("=")[0].removeprefix("data.").split(".")[0]
    holder = next(part for part in vars(config).values() if dataclasses.is_dataclass(part) and hasattr(part, name))
    assert getattr(holder, name) == found
    assert type(getattr(holder, name)) is type(found)


@pytest.mark.parametrize(
    "text",
    [
        "0123456",
        "1e10",
        "2022_01",
        "2.10",
        "2024-01-01",
        "12:30:45",
        "You are: brief # and kind",
        "[INST] be brief",
        "-",
    ],
)
def test_text_stays_as_it_was_typed_on_the_command_line(text: str) -> None:
    assert resolved(f"data.system_prompt={text}").data.system_prompt == text
    assert resolved(f"model.revision={text}").model.revision == text


@pytest.mark.parametrize("text", ["0123456", "1e10", "2022_01", "2.10", "2024-01-01", "2024-13-45", "12:30:45"])
def test_text_stays_as_it_was_written_in_yaml(text: str, tmp_path: Path) -> None:
    assert resolved(yaml_text=f"model:\n  revision: {text}\n", folder=tmp_path).model.revision == text


def test_quotes_make_a_text_of_a_truth_value() -> None:
    assert resolved("data.split='yes'").data.split == "yes"
    error = refusal("data.split=yes")
    assert "expected text, found 'yes'" in error.message
    assert error.fix == "As a text it is written in quotes: 'yes'"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("max_steps=many", "train.max_steps (command line): expected a whole number, found 'many'."),
        ("max_steps=1.5", "train.max_steps (command line): expected a whole number, found '1.5'."),
        ("max_steps=true", "train.max_steps (command line): expected a whole number, found 'true'."),
        ("max_steps=null", "train.max_steps (command line): expected a whole number, found None."),
        ("max_steps=[1]", "train.max_steps (command line): expected a whole number, found [1]."),
        ("learning_rate=fast", "train.learning_rate (command line): expected a number, found 'fast'."),
        ("learning_rate=nan", "train.learning_rate (command line): expected a number, found 'nan'."),
        ("learning_rate=inf", "train.learning_rate (command line): expected a number, found 'inf'."),
        ("use_dora=1", "lora.use_dora (command line): expected true or false, found '1'."),
        ("data.split=[a]", "data.split (command line): expected text, found ['a']."),
        ("data.path=null", "data.path (command line): expected text, found None."),
        ("weights=[1, two]", "data.weights (command line): expected a number, found 'two'."),
        ("data.columns=question", "data.columns (command line): expected {key: value}, found 'question'."),
        ("data.columns={a: [b]}", "data.columns (command line): expected text, found ['b']."),
        ("data.columns.a=[b]", "data.columns.a (command line): expected text, found ['b']."),
        ("data.columns={a: b, a: c}", "data.columns (command line): 'a' is written twice (lines 1 and 1)."),
        ("train_on=first", "data.train_on (command line): expected one of all, last; found 'first'."),
    ],
)
def test_a_wrong_type_names_the_setting_what_was_expected_and_what_was_found(word: str, message: str) -> None:
    assert refusal(word).message == message


def test_a_wrong_type_in_yaml_names_file_and_line(tmp_path: Path) -> None:
    error = refusal(yaml_text="train:\n  seed: 1\n  max_steps: many\n", folder=tmp_path)
    assert error.message == f"train.max_steps ({tmp_path / 'mine.yaml'}:3): expected a whole number, found 'many'."


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("learning_rate=5", "train.learning_rate (command line): expected a number in [0, 1], found 5."),
        ("learning_rate=-0.1", "train.learning_rate (command line): expected a number in [0, 1], found -0.1."),
        ("lora.r=-1", "lora.r (command line): expected a number in [0, inf), found -1."),
        ("lora.r=0", "lora.r (command line): 0 trains all weights."),
        ("lora_dropout=1", "lora.lora_dropout (command line): expected a number in [0, 1), found 1."),
        ("num_train_epochs=0", "train.num_train_epochs (command line): expected a number in (0, inf), found 0."),
        ("weights=[1, -1]", "data.weights (command line): expected a number in [0, inf), found -1."),
        ("eval_steps=0", "train.eval_steps (command line): expected a number in [1, inf), found 0."),
        ("evaluate.batch_size=0", "evaluate.batch_size (command line): expected a number in [1, inf), found 0."),
        ("seed=-1", "train.seed (command line): expected a number in [0, 4294967295], found -1."),
        ("beta=-1", "beta (command line): expected a number in [0, inf), found -1."),
        ("max_steps=-2", "train.max_steps (command line): expected a number in [-1, inf), found -2."),
        ("max_steps=0", "train.max_steps (command line): 0 trains nothing."),
    ],
)
def test_a_number_out_of_range_is_refused_with_its_interval(word: str, message: str) -> None:
    assert refusal(word).message == message


def test_the_ends_of_an_interval_are_allowed_where_the_bracket_says_so() -> None:
    config = resolved("learning_rate=0", "lora_dropout=0", "data.max_lost=1", "max_steps=-1", "evaluate.size=0")
    assert (config.train.learning_rate, config.data.max_lost) == (0, 1)


@pytest.mark.parametrize("word", ["early_stopping_patience=2", "metric_for_best_model=exact_match"])
def test_stopping_and_best_without_held_out_losses_on_the_way_are_refused(word: str) -> None:
    error = refusal(word)
    assert "has no effect without held-out losses on the way" in error.message
    assert error.fix.startswith("Add train.eval_steps=20")
    resolved(word, "eval_steps=20")


@pytest.mark.parametrize(
    ("word", "near"), [("lr_scheduler_type=cosin", "cosine"), ("optim=adamw_bnb8bit", "adamw_bnb_8bit")]
)
def test_a_schedule_or_optimizer_unknown_to_transformers_is_answered_with_near_ones(word: str, near: str) -> None:
    error = refusal(word)
    assert "is not known to transformers" in error.message
    assert near in error.fix


def test_check_refuses_settings_made_in_python_too() -> None:
    config = Config()
    check(config)
    config.train.max_steps = 0
    with pytest.raises(SettingsError, match=r"^train\.max_steps: 0 trains nothing"):
        check(config)


# names


def test_a_bare_name_of_ours_that_means_another_setting_elsewhere_must_say_which_one() -> None:
    error = refusal("batch_size=4")
    assert error.message.endswith(f"say which one (command line): evaluate.batch_size or {BATCH}.")
    assert resolved("evaluate.batch_size=4").evaluate.batch_size == 4


@pytest.mark.parametrize(("theirs", "ours"), sorted(KNOWN_ELSEWHERE.items() - {("batch_size", BATCH)}))
def test_a_name_known_elsewhere_is_answered_with_ours(theirs: str, ours: str) -> None:
    error = refusal(f"{theirs}=1")
    assert error.message == f"{theirs}: unknown setting (command line)."
    assert error.fix == f"Did you mean {ours}? See all: python -m finetune_kit show lora_sft"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("lora_rank", "lora.r"),
        ("lora.rank", "lora.r"),
        ("micro_batch_size", "train.per_device_train_batch_size"),
        ("train.num_epochs", "train.num_train_epochs"),
        ("warmup_ratio", "train.warmup_steps"),
        ("max_seq_length", "data.max_length"),
        ("learning_rat", "train.learning_rate"),
        ("train.lerning_rate", "train.learning_rate"),
        ("model.learning_rate", "train.learning_rate"),
        ("lora.alpha", "lora.lora_alpha"),
        ("betta", "beta"),
    ],
)
def test_a_name_nearly_right_is_answered_with_the_right_one_in_yaml_with_its_line(
    theirs: str, ours: str, tmp_path: Path
) -> None:
    error = refusal(yaml_text=f"# mine\n{theirs}: 1\n", folder=tmp_path)
    assert error.message == f"{theirs}: unknown setting ({tmp_path / 'mine.yaml'}:2)."
    assert f"Did you mean {ours}?" in error.fix


def test_every_name_known_elsewhere_points_at_a_setting_that_there_is() -> None:
    names = {f"{name}.{item.name}" for name, cls in SECTIONS.items() for item in dataclasses.fields(cls)}
    assert {ours for ours in KNOWN_ELSEWHERE.values() if not ours.startswith("train.extra.")} <= names
    ambiguous = [theirs for theirs in KNOWN_ELSEWHERE if theirs in {name.rpartition(".")[2] for name in names}]
    assert ambiguous == ["batch_size"]


def test_a_name_like_nothing_is_refused_without_a_guess() -> None:
    assert refusal("zzzzzz=1").fix == "See all: python -m finetune_kit show lora_sft"


@pytest.mark.parametrize("word", ["lora.r=8", "r=8", "lora_rank=8", "lora.anything=1", "lora=1"])
def test_a_lora_setting_has_no_effect_in_full_sft(word: str) -> None:
    recipe = recipes.load("full_sft")
    with pytest.raises(SettingsError) as caught:
        resolve(recipe.config_class, "full_sft", None, [word])
    assert "has no effect in full_sft: the recipe has no section 'lora' (command line)" in caught.value.message
    assert "python -m finetune_kit list" in caught.value.fix


def test_a_section_is_not_a_setting(tmp_path: Path) -> None:
    assert refusal("train=5").message == "train is a section, not a setting (command line)."
    error = refusal(yaml_text="train: fast\n", folder=tmp_path)
    assert error.message == f"{tmp_path / 'mine.yaml'}:1: expected 'key: value' lines, found 'fast'."


def test_a_word_without_equals_is_no_setting() -> None:
    assert refusal("learning_rate").message == "'learning_rate' is not a setting: expected key=value."


# dict settings


def test_entries_of_a_dict_are_added_one_by_one_and_both_origins_are_named(tmp_path: Path) -> None:
    text = "train:\n  extra: {adam_beta2: 0.99}\n"
    config = resolved("train.extra.adam_epsilon=1e-6", yaml_text=text, folder=tmp_path)
    assert config.train.extra == {"adam_beta2": 0.99, "adam_epsilon": 1e-6}
    assert config.origins == {"train.extra": f"{tmp_path / 'mine.yaml'}:2, command line"}


def test_a_whole_dict_replaces_what_was_there(tmp_path: Path) -> None:
    config = resolved("train.extra={a: 1}", yaml_text="train:\n  extra: {b: 2}\n", folder=tmp_path)
    assert config.train.extra == {"a": 1}
    assert config.origins == {"train.extra": "command line"}


def test_mutable_defaults_are_not_shared_between_two_configs() -> None:
    resolved("train.extra.a=1")
    first = resolved()
    first.train.report_to.append("tensorboard")
    assert resolved().train.extra == {}
    assert resolved().train.report_to == []


# files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "{file}: 'seed' is written twice (lines 1 and 2)."),
        ("train:\n  seed: 1\n  seed: 2\n", "{file}: 'seed' is written twice (lines 2 and 3)."),
        ("- seed\n", "{file}:1: expected 'key: value' lines, found ['seed']."),
        ("seed: [1\n", "{file}: not readable as YAML: "),
        ("seed: 1\n\tlr: 2\n", "{file}: not readable as YAML: "),
        ("? [a, b]\n: 1\n", "{file}: "),
    ],
)
def test_a_broken_file_is_named_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    error = refusal(yaml_text=text, folder=tmp_path)
    assert error.message.startswith(message.format(file=tmp_path / "mine.yaml"))


def test_a_file_that_is_missing_or_not_utf8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.yaml: no such file"):
        resolve(Config, "lora_sft", tmp_path / "none.yaml")
    with pytest.raises(SettingsError, match="no such file"):
        resolve(Config, "lora_sft", tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"# caf\xe9\nseed: 1\n")
    with pytest.raises(SettingsError, match=r"not UTF-8 \(byte 5\)"):
        resolve(Config, "lora_sft", tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system", "!!python/object/new:os.system", "!!python/name:os.system", "!mine"]
)
@pytest.mark.parametrize("key", ["recipe", "seed", "train.extra"])
def test_a_tag_that_would_build_an_object_is_a_security_error_and_runs_nothing(
    tag: str, key: str, tmp_path: Path
) -> None:
    marker, file = tmp_path / "ran", tmp_path / "evil.yaml"
    file.write_text(f"{key}: {tag} ['touch {marker}']\n")
    for read in (lambda: resolve(Config, "lora_sft", file), lambda: recipe_of_yaml(file)):
        with pytest.raises(SecurityError, match=r"evil\.yaml: could not determine a constructor for the tag"):
            read()
    with pytest.raises(SecurityError):
        resolved(f"{key}={{a: {tag} ['touch {marker}']}}")
    assert not marker.exists()


def test_recipe_versions_and_origins_are_not_settings(tmp_path: Path) -> None:
    text = "recipe: lora_sft\nversions: {torch: '2'}\norigins: {lora.r: command line}\nlora: {r: 3}\n"
    config = resolved(yaml_text=text, folder=tmp_path)
    assert config.lora.r == 3
    assert set(config.origins) == {"lora.r"}


@pytest.mark.parametrize("text", ["seed: 1\n", "recipe: [a]\n", "recipe: {a: b}\n", ""])
def test_a_yaml_that_names_no_recipe_says_how_to(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(SettingsError) as caught:
        recipe_of_yaml(tmp_path / "mine.yaml")
    assert "does not say which recipe" in caught.value.message
    assert "Begin it with 'recipe: lora_sft'" in caught.value.fix


# run.yaml


def settings_of(config: RecipeConfig) -> dict[str, Any]:
    return {leaf.key: leaf.value for leaf in leaves(config)}


def test_the_run_yaml_of_a_run_resolves_to_the_same_settings_again(tmp_path: Path) -> None:
    words = (
        *("learning_rate=1e-5", "lora_dropout=0.25", "data.path=[a.jsonl, 'b c.jsonl']", "weights=[1, 3]"),
        *("data.columns={yes: question, '1e3': answer}", "train.extra.adam_epsilon=1e-6", "model.revision=0123456"),
        *("data.system_prompt=Say: 'no' # or 1e-4", "report_to=[]", "eval_steps=5", "data.name=2022_01"),
    )
    config = resolved(*words)
    (tmp_path / "run.yaml").write_text(to_yaml(config, {"torch": "2.13.0"}), encoding="utf-8")
    again = resolve(Config, recipe_of_yaml(tmp_path / "run.yaml"), tmp_path / "run.yaml")
    assert settings_of(again) == settings_of(config)
    written = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert written["recipe"] == "lora_sft"
    assert written["versions"] == {"torch": "2.13.0"}
    assert written["origins"]["data.name"] == "command line"


@hypothesis_settings(deadline=None, max_examples=40)
@example("None")
@example("1e-4")
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=30))
def test_any_text_survives_run_yaml(text: str) -> None:
    config = Config()
    config.data.system_prompt, config.train.extra, config.data.columns = text, {"a": text}, {text: "question"}
    node = resolve_text(to_yaml(config, {}))
    assert (node.data.system_prompt, node.train.extra, node.data.columns) == (text, {"a": text}, {text: "question"})


@hypothesis_settings(deadline=None, max_examples=40)
@given(st.floats(0, 1), st.integers(0, 2**32 - 1), st.floats(allow_nan=False, allow_infinity=False))
def test_any_number_survives_run_yaml(rate: float, seed: int, extra: float) -> None:
    config = Config()
    config.train.learning_rate, config.train.seed, config.train.extra = rate, seed, {"a": extra}
    again = resolve_text(to_yaml(config, {}))
    assert (again.train.learning_rate, again.train.seed, again.train.extra) == (rate, seed, {"a": extra})


def resolve_text(text: str) -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        file.write_text(text, encoding="utf-8")
        return resolve(Config, "lora_sft", file)


def test_the_path_of_a_recipe_of_one_s_own_is_kept_for_the_next_time() -> None:
    config = resolve(Config, "/home/me/mine.py")
    assert (config.recipe, config.recipe_word) == ("mine", "/home/me/mine.py")
    assert yaml.safe_load(to_yaml(config, {}))["recipe"] == "/home/me/mine.py"


# the recipes' own settings


@pytest.mark.parametrize("name", recipes.BUILTIN)
def test_every_setting_of_a_recipe_has_a_help_text_and_numbers_have_an_interval(name: str) -> None:
    config = recipes.load(name).config_class()
    for leaf in leaves(config):
        assert leaf.help, leaf.key
        assert len(leaf.help) <= 120, leaf.key
        if leaf.annotation in (int, float, int | None, float | None):
            assert leaf.within, leaf.key
    check(config)


@pytest.mark.parametrize("merged", ["<<: {max_steps: 3}"])
def test_a_merge_key_is_refused_by_its_name(merged: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(f"train:\n  {merged}\n")
    recipe = recipes.load("lora_sft")
    with pytest.raises(SettingsError, match=r"x.yaml:2: merge keys \(<<\) are not read"):
        resolve(recipe.config_class, recipe.word, tmp_path / "x.yaml", [])
