"""training/begin.py: what a run's result depends on is recorded when it begins, and compared when it continues."""

from pathlib import Path

import pytest

from finetune_kit.errors import SettingsError
from finetune_kit.training.begin import _texts, _with_imports, file_of
from tests.fixtures_training import prepare
from tests.rl.fixtures import write_home


def test_files_are_found_wherever_the_settings_name_them_with_what_they_import(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import helper\nfrom pack.inner import one\nimport json")
    (tmp_path / "helper.py").write_text("from pack import inner")
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "inner.py").write_text("from . import deep")
    (tmp_path / "pack" / "deep.py").write_text("one = 1")
    found = _with_imports(tmp_path / "mine.py")
    assert {path.name for path in found} == {"mine.py", "helper.py", "inner.py", "deep.py"}
    named = {"a": [f"{tmp_path}/mine.py:score", {"b": (f"{tmp_path}/helper.py",)}], "c": ["x" * 5000, "a:b", "task"]}
    places = {key: file_of(text) for key, text in _texts("s", named)}
    assert {key: path.name for key, path in places.items() if path} == {"s.a[0]": "mine.py", "s.a[1].b[0]": "helper.py"}


@pytest.mark.parametrize("changed", ["rewards.py", "helper.py"])
def test_a_reward_file_that_changed_since_the_kill_is_told_and_not_gone_on_with(tmp_path: Path, changed: str) -> None:
    home = write_home(tmp_path)
    (home / "rewards.py").write_text(
        "import helper\ndef score(completions, **_): return map(helper.worth, completions)"
    )
    (home / "helper.py").write_text("worth = len")
    run = prepare("grpo", home, f"reward.sources=[{home / 'rewards.py'}:score]", "num_generations=4")
    again = (f"output_dir={run.folder}", f"reward.sources=[{home / 'rewards.py'}:score]", "num_generations=4")
    prepare("grpo", home, *again)
    with (home / changed).open("a") as file:
        file.write("\n# another")
    with pytest.raises(SettingsError, match=r"other files that the settings name: reward\.sources\[0\]"):
        prepare("grpo", home, *again)
