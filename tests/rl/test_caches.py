"""Sampling on each kind of cache: rows that have ended leave it where it can let them go, and change nothing."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_kit.generation import cache
from finetune_kit.rl.rollout import sample
from tests.models.architectures import tiny_config

MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8, "mamba_n_groups": 1}
SHAPES: dict[str, dict[str, Any]] = {
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128, "num_hidden_layers": 2, "head_dim": 16, "intermediate_size": 96},
    "bamba": {**MAMBA, "attn_layer_indices": [1], "num_hidden_layers": 2, "intermediate_size": 96},
    "recurrent_gemma": {
        **{"num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 16, "head_dim": 16},
        **{"intermediate_size": 96, "block_types": ["recurrent", "recurrent", "attention"]},
    },
}
BEGINNING = list(range(40, 52))  # of all prompts
PROMPTS = [[*BEGINNING, *range(60 + 9 * n, 61 + 10 * n)] for n in range(8)]  # 13 to 20 tokens
# kind: whether rows leave its cache
KINDS = {
    "mistral": True,  # a sliding window
    "gemma3_text": True,  # sliding windows and full attention
    "qwen3_next": True,  # linear attention and full attention
    "falcon_h1": True,  # state and attention in one layer
    "bamba": True,  # state or attention
    "lfm2": True,  # convolutions and attention
    "mamba": True,  # states alone
    "minimax": True,  # a cache of the model's own, which lets rows go
    "deepseek_v4": False,  # layers of the model's own, which do not say how
    "recurrent_gemma": None,  # none that is handed back: each step reads all of each row
}


def some_model(kind: str) -> Any:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 261}
    ids = {"pad_token_id": 0, "eos_token_id": 3, "bos_token_id": None}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes, **ids, **SHAPES[kind]) if kind in SHAPES else tiny_config(kind)
    if getattr(config, "sliding_window", None):
        config.sliding_window = 16
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(2)  # answers that differ
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_leave_and_rows_that_stay_get_the_tokens_that_each_row_gets_alone(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, keep = some_model(kind), cache.Growing.keep

    def drawn(ends: list[int], stay: bool) -> tuple[list[list[int]], int]:
        left: list[bool] = []

        def counted(state: cache.Growing, rows: Any) -> bool:
            left.append(not stay and keep(state, rows))
            return left[-1]

        monkeypatch.setattr(cache.Growing, "keep", counted)
        asked: dict[str, Any] = {"temperature": 1e-6, "seed": 0, "batch_size": 8}
        found = sample(model, PROMPTS, max_new_tokens=12, end_token_ids=ends, **asked)
        return [row.ids for row in found], sum(left)

    free, _ = drawn([], stay=True)
    ends = sorted({row[at] for row, at in zip(free, (1, 2, 3, 4, 5), strict=False)})
    stayed, left = drawn(ends, stay=True)
    assert left == 0
    assert len({len(row) for row in stayed}) > 1
    went, left = drawn(ends, stay=False)
    assert went == stayed
    assert (left > 0) == (KINDS[kind] is True)
    assert isinstance(cache.begin_rows(model, PROMPTS), cache.Whole) == (KINDS[kind] is None)
    if KINDS[kind] is False:
        return  # of a batch with padding on the left it makes other blocks of columns than of a row alone
    for prompt, row in list(zip(PROMPTS, free, strict=True))[::3]:
        for at, token in enumerate(row[:6]):
            ids = torch.tensor([[*prompt, *row[:at]]])
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[0, -1]
            assert float(logits.max() - logits[token]) < 1e-3
