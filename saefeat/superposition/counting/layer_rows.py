"""The activations that are counted in: those of one hook, or of several side by side."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from saefeat.activations.sources import Batch
from saefeat.activations.stream import ActivationStream
from saefeat.training.new_bank import group_name

HELD_OUT_ROWS = 30_000
"""Rows that fits are measured on, and densities; fewer where fewer were held out."""


class LayerRows:
    """Rows of one hook, or of several side by side, as often as they are asked for.

    Several hooks are each scaled to mean norm sqrt(d), so that all weigh alike: what is counted is
    how many features the layers hold jointly.

    Args:
        stream: Where they come from.
        hook_names: Which of its hooks.

    Raises:
        KeyError: The stream has no such hook.
        ValueError: No hook or one twice is named, nothing was held out, or a hook is always 0.
    """

    def __init__(self, stream: ActivationStream, hook_names: Sequence[str]) -> None:
        if not hook_names or len(set(hook_names)) < len(hook_names):
            raise ValueError(f"Name at least one hook, each once, got {list(hook_names)}.")
        for hook_name in hook_names:
            if hook_name not in stream.hooks:
                raise KeyError(
                    f"The stream has no hook {hook_name!r}; it has {', '.join(stream.hooks)}."
                )
        self.name = group_name(hook_names)
        self.width = sum(stream.widths[hook_name] for hook_name in hook_names)
        self._stream = stream
        self._hook_names = list(hook_names)
        held_out = list(stream.held_out_batches(HELD_OUT_ROWS))
        self._factors = [1.0] * len(hook_names)
        if len(hook_names) > 1:
            self._factors = [self._factor(hook_name, held_out) for hook_name in hook_names]
        self.held_out: Float[Tensor, "n d"] = torch.cat([self._rows(one) for one in held_out]).cpu()
        """Rows that no fit learns from."""

    def batches(self, n_rows: int, size: int) -> Iterator[Float[Tensor, "m d"]]:
        """The first `n_rows` rows to learn from, `size` at a time whatever the stream's batches."""
        left: Tensor | None = None
        for batch in self._stream.batches(n_rows):
            rows = self._rows(batch)
            if left is not None:
                rows = torch.cat([left, rows])
            n_whole = len(rows) - len(rows) % size
            for start in range(0, n_whole, size):
                yield rows[start : start + size]
            left = rows[n_whole:] if n_whole < len(rows) else None
        if left is not None:
            yield left

    def _factor(self, hook_name: str, held_out: Sequence[Batch]) -> float:
        norms = torch.cat([batch[hook_name].float().norm(dim=1) for batch in held_out])
        mean = float(norms.mean())
        if not mean > 0:
            raise ValueError(f"All activations of {hook_name} are zero. Is the hook ever used?")
        return float(self._stream.widths[hook_name] ** 0.5 / mean)

    def _rows(self, batch: Batch) -> Float[Tensor, "m d"]:
        parts = [
            batch[hook_name].float() * factor if factor != 1 else batch[hook_name].float()
            for hook_name, factor in zip(self._hook_names, self._factors, strict=True)
        ]
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]
