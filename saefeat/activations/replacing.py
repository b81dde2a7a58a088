"""Replaces what a model computes at a hook, all of it or the rows that count.

Shape letters: b contexts, s positions in a context, n rows that are replaced, d width of the hook,
d_in width of the hook that the replacement is made of.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saefeat.activations.hook_names import resolve_hooks
from saefeat.activations.hook_points import attached


@contextmanager
def replaced_activations(
    model: Any,
    hook_name: str,
    function: Callable[[Tensor, Tensor], Tensor],
    source: str | None = None,
) -> Iterator[None]:
    """While it is open, every forward of `model` goes on with what `function` makes of a hook.

    Args:
        model: A TransformerLens model.
        hook_name: One hook.
        function: Is given the hook's value as [b, s, d], heads flattened, and that of `source`,
            and returns a tensor of the first one's shape, which is converted to the model's
            dtype. It must not change what it is given.
        source: A hook that is reached before; None for `hook_name` itself.

    Raises:
        ValueError: A name is unknown or stands for several hooks, or, in a forward,
            `function` returns another shape or `source` was not reached before.
    """
    name, source_name = (_only_hook(model, one) for one in (hook_name, source or hook_name))
    read: list[Tensor] = []

    def keep(value: Tensor, hook: Any) -> None:
        read[:] = [value.flatten(2)]

    def replace(value: Tensor, hook: Any) -> Tensor:
        if not read:
            raise ValueError(f"{source_name} is not reached before {name}, which it replaces.")
        given = value.flatten(2)
        replaced = function(given, read.pop())
        if replaced.shape != given.shape:
            raise ValueError(
                f"The replacement at {name} has shape {list(replaced.shape)}, but "
                f"{list(given.shape)} was given. It must return one vector for each position."
            )
        return replaced.to(value.dtype).reshape(value.shape)

    with attached([(model.hook_dict[source_name], keep), (model.hook_dict[name], replace)]):
        yield


@contextmanager
def replaced_rows(
    model: Any,
    hook_name: str,
    function: Callable[[Tensor, Tensor], Tensor],
    *,
    source: str | None = None,
    positions: Bool[Tensor, "b s"] | None = None,
    max_norm_ratio: float | None = 10.0,
) -> Iterator[None]:
    """While it is open, every forward of `model` goes on with other rows at a hook.

    What dictionaries never see in training keeps its activation: positions that do not count
    (BOS, separators, padding), and attention sinks.

    Args:
        model: A TransformerLens model.
        hook_name: The hook whose rows are replaced.
        function: Is given those rows [n, d] and the same rows of `source` [n, d_in], in the
            model's dtype, and returns new ones [n, d], of any dtype and on any device.
        source: A hook that is reached before; None for `hook_name` itself.
        positions: Which positions of a forward are replaced; None for all. A forward of
            another shape is then an error.
        max_norm_ratio: Of them, only those are replaced whose norm at `source` is at most this
            many times the median of the forward; None replaces all.

    Raises:
        ValueError: As in `replaced_activations`, or a forward does not fit `positions`.
    """

    def replace(
        activations: Float[Tensor, "b s d"], read: Float[Tensor, "b s d_in"]
    ) -> Float[Tensor, "b s d"]:
        shape = activations.shape[:2]
        if positions is None:
            chosen = torch.ones(shape, dtype=torch.bool, device=activations.device)
        elif positions.shape == shape:
            chosen = positions.to(activations.device)
        else:
            raise ValueError(
                f"positions has shape {list(positions.shape)}, but this forward has contexts and "
                f"positions {list(shape)}. Give the mask of the token ids that the model reads."
            )
        if max_norm_ratio is not None:
            norms = read.float().norm(dim=-1)
            chosen = chosen & (norms <= max_norm_ratio * norms[chosen].median())
        replaced = activations.clone()
        replaced[chosen] = function(activations[chosen], read[chosen]).to(activations)
        return replaced

    with replaced_activations(model, hook_name, replace, source):
        yield


def _only_hook(model: Any, request: str) -> str:
    names = resolve_hooks(model, request)
    if len(names) != 1:
        raise ValueError(f"{request!r} stands for {len(names)} hooks; replace one at a time.")
    return names[0]
