"""The tools that answers may call, and within which limits; loads no heavy library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from finetune_kit.settings.schema import RecipeConfig
from finetune_kit.tools.load import load_tools
from finetune_kit.tools.tool import Tool


@dataclass(frozen=True)
class Toolbox:
    """The tools that may be called, how often in one answer, and for how long each; how conversations are rendered."""

    tools: dict[str, Tool]
    max_calls: int = 8
    timeout: float = 10.0
    kwargs: dict[str, Any] = field(default_factory=dict)
    in_text: str = "text"
    allow: Callable[[Tool, dict[str, Any]], bool] | None = None  # asked before a tool runs that is not built in

    @property
    def schemas(self) -> list[dict[str, Any]]:
        return [tool.schema for tool in self.tools.values()]


def toolbox_of(config: RecipeConfig) -> Toolbox | None:
    """The tools that a recipe's answers may call; None for none. Raises as `load_tools`."""
    if not config.tools:
        return None
    data = config.data
    return Toolbox(
        load_tools(config.tools),
        config.max_tool_calls,
        config.tool_timeout,
        data.chat_template_kwargs,
        data.special_tokens_in_text,
    )
