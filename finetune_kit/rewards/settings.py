"""The settings of rewards."""

from __future__ import annotations

from dataclasses import dataclass

from finetune_kit.settings.schema import setting

KNOWN = "Known: task (the data's own scorer), path/to/file.py:function, or a reward model's folder or Hub id."


@dataclass
class RewardConfig:
    sources: list[str] = setting(
        ["task"], "task (the data's own scorer), path/to/file.py:function, or a reward model's folder or Hub id"
    )
    weights: list[float] = setting([], "with several sources: the factor of each; unset: 1 each")
    batch_size: int = setting(16, "completions in one forward pass of a reward model", "rows", within="[1, inf)")
    timeout: float = setting(1800.0, "longest call of a reward function", "seconds", within="(0, inf)")
    ignore_gate: bool = setting(False, "use a reward model that failed its own test")
