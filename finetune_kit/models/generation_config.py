"""A model's generation config, fixed before training where transformers would refuse to save it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune_kit.errors import SettingsError

if TYPE_CHECKING:
    pass
from finetune_kit.models.source import log_once

# settings of sampling, with the value that asks for nothing
SAMPLES = {
    **{"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "top_h": None, "typical_p": 1.0},
    **{"epsilon_cutoff": 0.0, "eta_cutoff": 0.0},
}
# settings of generation that act with others alone, and that transformers refuses to save without them
IDLE = (
    *("early_stopping", "length_penalty", "cache_implementation", "output_scores", "output_logits"),
    *("output_attentions", "output_hidden_states", "num_return_sequences", "pad_token_id"),
)


def mend_generation_config(config: Any, name: str) -> None:
    """Fix a generation config that transformers would refuse to save after all the training.

    Sampling settings without do_sample, as many models have them, mean do_sample=true; what else has no effect where it
    stands is put back to its default; both are said. Raises SettingsError for what cannot be.
    """
    from transformers import GenerationConfig

    if config.temperature == 0:  # greedy, in the words of other libraries
        config.temperature = None
    samples = any(getattr(config, key, None) not in (None, default) for key, default in SAMPLES.items())
    if samples and config.do_sample is not True:
        config.do_sample = True
        log_once(f"note: {name}: its generation_config.json has sampling settings: do_sample=true is added to it")
    plain, idle = GenerationConfig(), []
    for key in IDLE:
        was = getattr(config, key, None)
        if was != getattr(plain, key, None) and _refused(config):
            setattr(config, key, getattr(plain, key, None))
            idle.append(f"{key}={was}")
    if idle and not _refused(config):
        log_once(f"note: {name}: left out of its generation_config.json, without effect there: {', '.join(idle)}")
    if said := _refused(config):
        raise SettingsError(
            f"model.name_or_path={name}: its generation_config.json could not be saved with the result: {said}",
            "Fix that file in a copy of the model's folder, and name the folder.",
        )


def _refused(config: Any) -> str:
    """What transformers has against saving a generation config, in one line; "" for nothing."""
    try:
        config.validate(strict=True)
    except (ValueError, TypeError) as error:
        return " ".join(str(error).split())[:300]
    return ""
