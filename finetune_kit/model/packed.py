"""The packed forward: the same numbers as a padded batch, without the padding and with shared beginnings computed once.

A batch of padded rows reaches the model. Its padding is dropped, rows that begin with the same tokens keep that
beginning once, and what is left is laid end to end as one row of n tokens. The layers run over those; in attention each
segment sees its own beginning and itself. Behind the backbone the hidden states are laid out as the caller expects:
padded rows, or, where labels are given, only the positions in front of a label, so that the language-model head runs
nowhere else; what TRL's fused head says of those positions is laid out in padded rows again.

Everything above the backbone is unchanged, and no forward is replaced: hooks before and behind the model and behind the
backbone, and one attention function of transformers' AttentionInterface.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ATTENTION = "finetune_kit_packed"
WORTH_SHARING = 8  # tokens: a shorter common beginning costs more in attention calls than it saves in the layers
TOLERANCE = 1e-4  # largest difference of a float32 log-probability from the padded model's


@dataclass(frozen=True)
class Segment:
    """Tokens that lie together in the packed row: `start`, `length`, and the segments before them in their rows."""

    start: int
    length: int
    before: tuple[Segment, ...]


@dataclass(frozen=True)
class Plan:
    """How a batch is packed.

    tokens: (n,), packed token -> its place in the flattened padded batch. positions: (n,), each token's place in its
    row. places: (b, t), padded place -> packed token, 0 where padded. real: (b, t), true where a token is.
    selected: (s,), packed tokens whose hidden state the caller wants; None: all, in the padded layout. wanted:
    (b, t - 1), true in front of a label; s in number. windows: attention notes the sliding windows that it masked here.
    """

    segments: tuple[Segment, ...]
    tokens: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor
    real: torch.Tensor
    selected: torch.Tensor | None = None
    wanted: torch.Tensor | None = None
    windows: set[int | None] = field(default_factory=set)


def make_plan(input_ids: torch.Tensor, attention_mask: torch.Tensor, share: bool) -> Plan:
    """Pack rows of (b, t) token ids whose real tokens lie together, padded on either side."""
    import torch

    rows, width = input_ids.shape
    real = attention_mask.bool()
    first = real.int().argmax(dim=1).tolist()
    texts = [ids[keep].tolist() for ids, keep in zip(input_ids, real, strict=True)]
    segments: list[Segment] = []
    tokens: list[int] = []
    positions: list[int] = []
    paths: list[list[Segment]] = [[] for _ in range(rows)]

    def lay(members: list[int], begin: int, end: int, before: tuple[Segment, ...]) -> tuple[Segment, ...]:
        """Put tokens begin..end of rows that share them into the packed row, once."""
        if begin == end:
            return before
        segment = Segment(len(tokens), end - begin, before)
        owner = members[0]
        tokens.extend(owner * width + first[owner] + place for place in range(begin, end))
        positions.extend(range(begin, end))
        segments.append(segment)
        for row in members:
            paths[row].append(segment)
        return (*before, segment)

    def split(members: list[int], begin: int, before: tuple[Segment, ...]) -> None:
        """Lay what all members share from `begin` on, then each group that goes on alike; members are sorted."""
        common = len(texts[members[0]])
        if len(members) > 1:
            common = _common(texts[members[0]], texts[members[-1]])
        if len(members) == 1 or common - begin >= WORTH_SHARING or all(len(texts[m]) == common for m in members):
            before, begin = lay(members, begin, common, before), common
        groups: dict[int, list[int]] = {}
        for row in members:
            if len(texts[row]) > common:
                groups.setdefault(texts[row][common], []).append(row)
            elif begin < common:  # it ends inside a beginning too short to be shared
                lay([row], begin, common, before)
        for group in groups.values():
            split(group, begin, before)

    if share:
        split(sorted(range(rows), key=texts.__getitem__), 0, ())
    else:
        for row in range(rows):
            lay([row], 0, len(texts[row]), ())
    places = torch.zeros_like(input_ids)
    for row, path in enumerate(paths):
        packed = [number for segment in path for number in range(segment.start, segment.start + segment.length)]
        places[row, first[row] : first[row] + len(packed)] = torch.tensor(packed, device=places.device)
    on = input_ids.device
    return Plan(tuple(segments), torch.tensor(tokens, device=on), torch.tensor(positions, device=on), places, real)


def _common(one: list[int], other: list[int]) -> int:
    """Length of the common beginning. Of sorted rows, the first and the last share what all of them share."""
    shortest = min(len(one), len(other))
    return next((place for place in range(shortest) if one[place] != other[place]), shortest)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packed: Plan | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of transformers' interface: query (1, heads, n, d), key and value (1, key heads, n, d); returns
    (1, n, heads, d). Each segment sees the segments before it in its rows, and itself up to each token, no further back
    than `sliding_window`. A call without a plan is transformers' own SDPA.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if packed is None:
        return sdpa_attention_forward(  # type: ignore[no-any-return]  # transformers ships no types here
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            sliding_window=sliding_window,
            **kwargs,
        )
    packed.windows.add(sliding_window)
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    outputs = []
    for segment in packed.segments:
        own = slice(segment.start, segment.start + segment.length)
        seen = [slice(part.start, part.start + part.length) for part in segment.before] + [own]
        keys, values = (torch.cat([states[:, :, part] for part in seen], dim=2) for states in (key, value))
        mask, ahead = None, keys.shape[2] - segment.length
        windowed = sliding_window is not None and keys.shape[2] > sliding_window
        if ahead or windowed:  # token i of the segment sees all before the segment, and i + 1 of its own
            mask = torch.ones(segment.length, keys.shape[2], dtype=torch.bool, device=keys.device).tril(ahead)
        if mask is not None and sliding_window is not None:  # of these, the last ones
            mask = mask.triu(ahead - sliding_window + 1)
        outputs.append(
            scaled_dot_product_attention(
                query[:, :, own],
                keys,
                values,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None and segment.length > 1,
                scale=scaling,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def enable(model: Any) -> str:
    """Turn the packed forward on for a language model or a sequence classifier, adapter or not, if it proves equal on
    the loaded weights.

    Returns "" where it is on, else the reason why the padded forward stays. It acts on calls with a batch of more than
    padding to drop and without a cache; generation is as before.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    if causal.device.type != "cpu":
        return f"the packed forward is not proven on {causal.device.type} yet"
    config = causal.base_model.config  # a classifier's backbone has one of its own
    before = config._attn_implementation
    if before != "sdpa":
        return f"the packed forward needs sdpa attention, not {before}"
    _register()
    # a classifier finds a row's last token in the padded batch: it is packed behind that, in front of the backbone
    outer = causal.base_model if hasattr(causal, "score") else model
    handles = [
        outer.register_forward_pre_hook(partial(_pack, windows=set()), with_kwargs=True),
        causal.base_model.register_forward_hook(_unpack, with_kwargs=True),
        outer.register_forward_hook(_lay_out, with_kwargs=True),
    ]
    reason = _disproof(model, causal)
    if reason:
        for handle in handles:
            handle.remove()
        config._attn_implementation = before
    return reason


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # for calls without a plan, such as generation


def _pack(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], windows: set[int | None]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before the model: replace a padded batch by its packed row; None leaves a call as it is.

    `windows`: the sliding windows that attention was given so far. Rows longer than another window stay padded.
    """
    import torch

    if len(args) == 1 and kwargs.get("input_ids") is None:
        kwargs = {**kwargs, "input_ids": args[0]}
        args = ()
    ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    causal = module.get_base_model() if hasattr(module, "get_base_model") else module
    config = causal.config
    if args or ids is None or mask is None or ids.dim() != 2 or mask.dim() != 2:
        return None
    if config._attn_implementation != ATTENTION:
        return None
    if kwargs.get("cache") is not None or kwargs.get("position_ids") is not None or kwargs.get("use_cache"):
        return None
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size"))
    limits = [limit for limit in found if limit is not None and limit not in windows]
    too_long = bool(limits) and int(mask.sum(dim=1).max()) > min(limits)
    if too_long or not bool(mask.any(dim=1).all()):
        return None
    plan = make_plan(ids, mask, share=not (module.training and _drops(module)))
    plan = replace(plan, windows=windows)
    kwargs = {**kwargs, "use_cache": False}
    labels = kwargs.get("labels")
    if labels is not None:
        wanted = (labels[:, 1:] != -100) & plan.real[:, :-1]
        if not bool(wanted.any()):
            return None
        plan = replace(plan, selected=plan.places[:, :-1][wanted], wanted=wanted)
        # the losses above shift labels by one: the first has nothing before it
        kwargs["labels"] = torch.cat([labels.new_full((1,), -100), labels[:, 1:][wanted]])[None]
    kwargs["input_ids"] = ids.flatten()[plan.tokens][None]
    kwargs["position_ids"] = plan.positions[None]
    # a mask of four dimensions is passed on as it is, so that none of n x n is built
    kwargs["attention_mask"] = ids.new_zeros((1, 1, 1, 1), dtype=torch.bool)
    kwargs["packed"] = plan
    return args, kwargs


def _drops(module: Any) -> bool:
    """Whether dropout acts: rows that share a beginning would then share its draw, which a padded batch does not."""
    import torch

    if getattr(module.config, "attention_dropout", 0.0):
        return True
    return any(isinstance(part, torch.nn.Dropout) and part.p > 0 for part in module.modules())


def _unpack(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Behind the backbone: hidden states (1, n, h) -> (b, t, h) with zeros where padded, or (1, s + 1, h)."""
    import torch

    plan = kwargs.get("packed")
    if plan is None:
        return output
    hidden = output.last_hidden_state[0]
    if plan.selected is None:
        output.last_hidden_state = hidden[plan.places] * plan.real.unsqueeze(-1)
    else:  # the last one is never read: the losses above drop it when they shift
        output.last_hidden_state = hidden[torch.cat([plan.selected, plan.selected[-1:]])][None]
    return output


def _lay_out(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Behind the model: what TRL's fused head says of each label, (1, s) -> (b, t - 1) with zeros elsewhere."""
    plan = kwargs.get("packed")
    if plan is None or plan.wanted is None or getattr(output, "log_probs", None) is None:
        return output
    for name in ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"):
        found = getattr(output, name)
        if found is not None:
            setattr(output, name, found.new_zeros(plan.wanted.shape).masked_scatter(plan.wanted, found[0]))
    output.label_mask = plan.wanted
    return output


def _disproof(model: Any, causal: Any) -> str:
    """Why the packed forward is not to be trusted on the loaded weights; "" if it gives the padded one's numbers.

    Four rows of random tokens, two of which begin alike, padded on the right.
    """
    import torch

    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, causal.config.get_text_config().vocab_size, (4, 24), generator=generator)
    ids[1, :12] = ids[0, :12]
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    mask[3, 5:] = 0
    ids[mask == 0] = causal.config.get_text_config().pad_token_id or 0  # a classifier finds a row's end by it
    moved = ids.clone()
    moved[0, 14] = (moved[0, 14] + 1) % causal.config.get_text_config().vocab_size
    real = mask.bool()

    def numbers(ids: torch.Tensor) -> list[torch.Tensor]:
        """A row's log-probabilities, or its scores."""
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        scores = logits.dim() == 2
        return [row if scores else row.log_softmax(-1)[keep] for row, keep in zip(logits, real, strict=True)]

    try:
        with torch.no_grad():
            padded = numbers(ids)
            causal.base_model.config._attn_implementation = ATTENTION
            packed, other = numbers(ids), numbers(moved)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        return f"this model does not take a packed row ({type(error).__name__})"
    finally:
        model.train(was_training)
    difference = max(float((one - two).abs().max()) for one, two in zip(packed, padded, strict=True))
    if not difference <= TOLERANCE:
        return f"packed and padded log-probabilities differ by {difference:.1e} on this model"
    moved_too = max(float((one - two).abs().max()) for one, two in zip(packed[1:], other[1:], strict=True))
    if moved_too > TOLERANCE / 10:
        return "a change in one row moves another one on this model"
    return ""
