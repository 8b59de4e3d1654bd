"""Measure a run's models on the same held-out rows, in the same way, and say what the difference is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from finetune_kit.data.load import Data
from finetune_kit.evaluation.compare import Report, compare, held_out_scores
from finetune_kit.evaluation.continuations import continue_texts, say_continuation
from finetune_kit.evaluation.measure import Judge, Measurement, measure
from finetune_kit.evaluation.reward_gate import Rewards, compare_rewards, held_out_rewards, measure_rewards
from finetune_kit.generation.toolbox import Toolbox
from finetune_kit.settings.schema import EvaluateConfig
from finetune_kit.system.progress_bar import progress_bar


class Evaluator:
    """What one run measures by: its tokenizer, its held-out rows, its settings.

    `beta`: of a method that trains on preferences; the first model measured is then its reference. `judge`: a reward
    that scores the answers, as metric "reward". `toolbox`: tools that the answers may call. `continues`: how many
    tokens the model writes after the beginnings of held-out texts, in the report, and after one of them each time that
    it is scored on the way.
    """

    def __init__(
        self,
        tokenizer: Any,
        data: Data,
        config: EvaluateConfig,
        *,
        beta: float | None = None,
        judge: Judge | None = None,
        toolbox: Toolbox | None = None,
        continues: int = 0,
    ) -> None:
        self.tokenizer, self.data, self.config, self.beta, self.judge = tokenizer, data, config, beta, judge
        self.toolbox = toolbox
        self.continues = continues
        self.start: Measurement | None = None

    def measure(self, model: Any, when: str) -> Measurement:
        """Losses, answers and their scores on the held-out rows; `when` names it in the progress bar: before, after.

        Raises as `evaluation.measure.measure` does, and SettingsError for a guard that names nothing measured.
        """
        found = measure(
            model, self.tokenizer, self.data, self.config, progress_bar(when), judge=self.judge, toolbox=self.toolbox
        )
        if self.start is None and self.config.guards:  # one that names nothing is told now, not after training
            compare(found, found, replace(self.config, bootstrap_samples=1), self.beta or 1.0)
        if self.continues:
            continue_texts(found, model, self.tokenizer, self.data, self.continues)
        self.start = self.start or found
        return found

    def scores(self, model: Any, metric: str = "loss") -> dict[str, float]:
        """The held-out loss and, where it is another one, `metric`: what a run is watched by while it trains."""
        start, beta = (None, 1.0) if self.beta is None else (self.start, self.beta)
        if self.continues:
            say_continuation(model, self.tokenizer, self.data, self.continues)
        return held_out_scores(model, self.tokenizer, self.data, self.config, metric, start, beta, self.toolbox)

    def compare(self, before: Measurement, after: Measurement, history: Sequence[dict[str, float]] = ()) -> Report:
        """The report: differences with their intervals, and the verdict."""
        return compare(before, after, self.config, self.beta or 1.0, history)


class RewardEvaluator:
    """The same of a reward model: scores of held-out pairs, and its gate."""

    def __init__(self, tokenizer: Any, data: Data, config: EvaluateConfig) -> None:
        self.tokenizer, self.data, self.config = tokenizer, data, config

    def measure(self, model: Any, when: str) -> Rewards:
        """The scores of all held-out pairs. Raises as `evaluation.reward_gate.measure_rewards` does."""
        return measure_rewards(model, self.tokenizer, self.data, self.config, progress_bar(when))

    def scores(self, model: Any, metric: str = "loss") -> dict[str, float]:
        """The pair loss and the preference accuracy on the held-out pairs."""
        return held_out_rewards(model, self.tokenizer, self.data, self.config, metric)

    def compare(self, before: Rewards, after: Rewards) -> Report:
        """The report, with whether the model is good enough to train against."""
        return compare_rewards(before, after, self.data, self.config)
