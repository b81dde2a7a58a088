"""Reads activations at the hook points of a TransformerLens model.

The model is known by duck typing: `hook_dict` names its hook points, and calling it runs it.
That holds for every TransformerLens class of versions 3.9 and 4.x, and keeps TransformerLens
itself out of this room.

Shape letters: b contexts, s positions in a context, d width of a hook (heads flattened), n rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saefeat.activations.hook_reader import HookReader


def read_activations(
    model: Any,
    token_ids: Int[Tensor, "*b s"],
    hooks: str | Sequence[str],
    *,
    attention_mask: Bool[Tensor, "*b s"] | Int[Tensor, "*b s"] | None = None,
    batch_size: int = 32,
    flatten_heads: bool = False,
) -> dict[str, Float[Tensor, "n _"]]:
    """The activations of every token at every hook, in order.

    Args:
        model: A TransformerLens model.
        token_ids: One context [s], or several [b, s].
        hooks: Names or patterns, see `resolve_hooks`.
        attention_mask: 1 where a position holds a token; the other positions are left out.
            Without it every position counts.
        batch_size: Contexts in one forward.
        flatten_heads: Reads hooks with a head axis as one vector for each position.

    Returns:
        {hook name: [n, d]}: the counted positions of the first context, then of the second,
        the same at every hook. In the model's dtype and on its device.

    Raises:
        ValueError: A hook cannot be read (see `HookReader`), there are no tokens, the mask is
            not of their shape, or the batch size is not positive.
    """
    if token_ids.ndim > 2 or token_ids.numel() == 0 or batch_size < 1:
        raise ValueError(
            f"token_ids of shape {list(token_ids.shape)} with batch_size={batch_size} cannot be "
            "read. Give one context [s] or several [b, s], at least one token and a batch size "
            "of at least 1."
        )
    token_ids = torch.atleast_2d(token_ids)
    mask = None if attention_mask is None else torch.atleast_2d(attention_mask)
    if mask is not None and mask.shape != token_ids.shape:
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)} and token_ids {list(token_ids.shape)}. "
            "Give a 0 or a 1 for each token."
        )
    reader = HookReader(model, hooks, flatten_heads=flatten_heads)
    counted = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask.bool()
    n_rows = int(counted.sum())
    rows: dict[str, Tensor] = {}
    filled = 0
    for first in range(0, len(token_ids), batch_size):
        part = slice(first, first + batch_size)
        kept = counted[part].flatten().nonzero().squeeze(1)
        values = reader.read(token_ids[part], None if mask is None else mask[part])
        for name, value in values.items():
            if name not in rows:
                rows[name] = value.new_empty(n_rows, value.shape[-1])
            selected = value.flatten(0, 1).index_select(0, kept.to(value.device))
            rows[name][filled : filled + len(kept)] = selected
        filled += len(kept)
    return rows
