"""The settings of tools: one of `tools` and `data.tools` gives the other, and what has no effect is refused."""

from pathlib import Path

import pytest

from finetune_kit import recipe as recipes
from finetune_kit.errors import SecurityError, SettingsError
from finetune_kit.settings.checks import check_code, check_own_tools
from finetune_kit.settings.load import resolve, to_yaml
from finetune_kit.settings.schema import RecipeConfig


def settings(recipe: str, *words: str, yaml: Path | None = None) -> RecipeConfig:
    return resolve(recipes.load(recipe).config_class, recipe, yaml, words)


@pytest.mark.parametrize("recipe", ["lora_sft", "full_sft", "qlora_sft", "dpo", "ppo", "grpo"])
def test_one_setting_gives_the_other(recipe: str) -> None:
    for words in (["tools=[calculator]"], ["data.tools=[calculator]"], ["tools=calculator"]):
        config = settings(recipe, *words)
        assert list(config.tools) == config.data.tools == ["calculator"]
    listed = settings(recipe, "data.tools=[calculator]", "tools=[]")
    assert (listed.tools, listed.data.tools) == ([], ["calculator"])
    assert settings(recipe).tools == []


@pytest.mark.parametrize("recipe", ["kto", "orpo", "reward_model", "rloo"])
@pytest.mark.parametrize("word", ["tools=[calculator]", "data.tools=[calculator]"])
def test_a_recipe_without_the_loop_refuses_tools_with_the_reason(recipe: str, word: str) -> None:
    with pytest.raises(SettingsError, match=f"no effect in {recipe}: its (rollouts|answers) call no tools"):
        settings(recipe, word)


@pytest.mark.parametrize("word", ["max_tool_calls=3", "tool_timeout=2"])
def test_a_limit_of_no_tools_is_refused(word: str) -> None:
    with pytest.raises(SettingsError, match="no effect without tools"):
        settings("lora_sft", word)
    settings("lora_sft", word, "tools=[calculator]")


def test_bare_prompts_have_no_tools() -> None:
    with pytest.raises(SettingsError, match="bare prompts have no turns"):
        settings("lora_sft", "tools=[calculator]", "data.apply_chat_template=false")


def test_a_run_s_own_file_is_read_back_as_it_was_and_one_word_changes_both(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(settings("lora_sft", "data.tools=[calculator]", "tools=[]"), {}))
    again = settings("lora_sft", yaml=file)
    assert (again.tools, again.data.tools) == ([], ["calculator"])
    file.write_text(to_yaml(settings("lora_sft"), {}))
    now = settings("lora_sft", "tools=[calculator]", yaml=file)
    assert (now.tools, now.data.tools) == (["calculator"], ["calculator"])


def test_a_file_cannot_name_a_tool_that_is_code(tmp_path: Path) -> None:
    file = tmp_path / "theirs.yaml"
    file.write_text("recipe: lora_sft\ntools: [my_tools.py:lookup, calculator]\n")
    config = settings("lora_sft", yaml=file)
    with pytest.raises(SecurityError, match=r"my_tools\.py:lookup"):
        check_code(config)
    with pytest.raises(SecurityError, match="names tools that would be run as code"):
        check_own_tools(config)
    said = settings("lora_sft", "tools=[my_tools.py:lookup]", yaml=file)
    check_code(said)
    check_own_tools(said)
    file.write_text("recipe: lora_sft\ndata:\n  tools: [my_tools.py:lookup]\n")
    with pytest.raises(SecurityError, match=r"my_tools\.py:lookup"):
        check_code(settings("lora_sft", yaml=file))
