"""One of two processes: a model cut into shards by torch's own fully_shard, on gloo.

`two_shards.py HOME`; writes HOME/shards-<number>.json, losses of training with the packed forward and the guard,
and held-out losses; and HOME/sharded-True (LoRA) and sharded-False (full), the saved models.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from finetune_kit import distributed
from finetune_kit.evaluation.loss import Row, row_losses
from finetune_kit.models.coverage import layers_of
from finetune_kit.models.load import load_policy
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.packing import forward
from finetune_kit.runs.save import gathered, save_weights
from finetune_kit.settings.schema import LoraConfig, ModelConfig, RecipeConfig
from finetune_kit.training.guard import finite

ROWS: list[Row] = [
    ([1] * 9 + list(range(40, 44 + n)), [-100] * 9 + list(range(40, 44 + n))) for n in (3, 9, 5, 14, 8, 2, 11)
]


def policy(home: Path, lora: bool) -> Any:
    model = load_policy(ModelConfig(str(home / "tiny")), LoraConfig() if lora else None, trained_in_full=not lora)
    assert forward.enable(model) == ""
    return model


def train(model: Any) -> list[float]:
    """3 steps on all rows, the same on all processes, so that their mean is the gradient of one."""
    width = max(len(ids) for ids, _ in ROWS)
    ids, labels, mask = (
        torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])
        for rows, fill in (
            ([ids for ids, _ in ROWS], 0),
            ([said for _, said in ROWS], -100),
            ([[1] * len(i) for i, _ in ROWS], 0),
        )
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(3):
        loss = model.train()(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        assert finite(p.grad for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def figures(model: Any) -> dict[str, Any]:
    names = [f"row {number}" for number in range(len(ROWS))]
    return {"losses": train(model), "nll": row_losses(model, ROWS, names, 3)[0]}


if __name__ == "__main__":
    from torch.distributed.fsdp import fully_shard

    home = Path(sys.argv[1])
    distributed.start(on_cpu=True)
    found = {}
    for lora in (False, True):
        model = policy(home, lora)
        for block in layers_of(model):
            fully_shard(block)
        fully_shard(model)
        found[str(lora)] = {**figures(model), "sharded": distributed.is_sharded(model)}
        weights = gathered(model)
        config = RecipeConfig()
        config.model.name_or_path = str(home / "tiny")
        if distributed.is_main():
            save_weights(model, load_tokenizer(config.model), config, [3], home / f"sharded-{lora}", weights)
        distributed.barrier()
    (home / f"shards-{distributed.rank()}.json").write_text(json.dumps(found))
    distributed.finish()
