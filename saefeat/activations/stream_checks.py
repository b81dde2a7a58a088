"""What a stream refuses, and the defaults that it works out, before it reads anything."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from saefeat.activations.tokens import Tokens


def rows_to_mix(batch_size: int, buffer_rows: int | None) -> int:
    """Rows among which batches are drawn: those asked for, or the default."""
    if buffer_rows is None:
        return max(16 * batch_size, 65_536)
    if buffer_rows < batch_size:
        raise ValueError(
            f"buffer_rows={buffer_rows} holds less than a batch of {batch_size}. Give several "
            "batches, so that there is something to mix."
        )
    return buffer_rows


def check_numbers(batch_size: int, seed: int) -> None:
    """Refuse numbers that make no batches."""
    for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name}={value} is too small; it must be at least {least}.")


def check_fit(model: Any, tokens: Tokens) -> None:
    """Catches what would otherwise be an index error deep inside the model, or no text at all."""
    if not isinstance(tokens, Tokens):
        raise TypeError(
            f"tokens must come from load_tokens, which takes a {type(tokens).__name__} too if "
            "it holds token ids: it marks the positions that count and holds some out."
        )
    cfg = getattr(model, "cfg", None)
    vocabulary, longest = getattr(cfg, "d_vocab", None), getattr(cfg, "n_ctx", None)
    if vocabulary and vocabulary > 0 and int(tokens.ids.max()) >= vocabulary:
        raise ValueError(
            f"Token id {int(tokens.ids.max())} is beyond the model's vocabulary of {vocabulary}. "
            "The text was probably tokenised for another model."
        )
    if longest and tokens.context_size > longest:
        raise ValueError(
            f"Contexts of {tokens.context_size} tokens are longer than the model's {longest}."
        )


def split_rows(
    tensors: Mapping[str, Tensor], held_out_fraction: float, seed: int
) -> tuple[Int[Tensor, " n_train"], Int[Tensor, " n_held_out"]]:
    """The rows to train on, in random order, and those held out, in theirs.

    Raises:
        ValueError: The tensors are not aligned, or the share leaves nothing to train on.
    """
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    is_aligned = (
        all(x.ndim == 2 and x.is_floating_point() and x.numel() for x in tensors.values())
        and len({(len(x), x.device) for x in tensors.values()}) == 1
    )
    if not is_aligned:
        raise ValueError(
            f"The tensors have shapes {shapes}. Give floating-point matrices [n, d] on one "
            "device that agree in n, row i being the same sample in each."
        )
    n_rows = len(next(iter(tensors.values())))
    n_held_out = max(1, round(held_out_fraction * n_rows)) if 0 < held_out_fraction < 1 else 0
    if not 0 <= held_out_fraction < 1 or n_held_out >= n_rows:
        raise ValueError(
            f"held_out_fraction={held_out_fraction} of {n_rows} rows leaves none to train on "
            "or is no share; it must be at least 0 and below 1."
        )
    rows = torch.from_numpy(np.random.default_rng(seed).permutation(n_rows))
    return rows[n_held_out:], rows[:n_held_out].sort().values
