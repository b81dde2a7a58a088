"""Functions on a model's hook points for as long as a forward needs them, and the forward."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Classes that read padded batches, by what they call the mask: HookedTransformer and
# TransformerBridge, then HookedEncoder and HookedEncoderDecoder.
MASK_ARGUMENTS = ("attention_mask", "one_zero_attention_mask")


@contextmanager
def attached(functions: Sequence[tuple[Any, Callable[..., Any]]]) -> Iterator[None]:
    """Adds functions to hook points, and takes these and no others off again."""
    handles: list[tuple[Any, Any]] = []
    try:
        for point, function in functions:
            point.add_hook(function)
            # add_hook returns the handle in TransformerLens 4.x and None in 3.9.
            handles.append((point, point.fwd_hooks[-1]))
        yield
    finally:
        # Not model.reset_hooks(): it walks the whole model, and takes the user's hooks too.
        for point, handle in handles:
            handle.hook.remove()
            point.fwd_hooks.remove(handle)


def run_model(model: Any, token_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Runs a forward on the model's device, under the name that its class gives the mask."""
    device = next(model.parameters()).device
    mask: Mapping[str, Tensor] = {}
    if attention_mask is not None:
        accepted = inspect.signature(model.forward).parameters
        name = next((name for name in MASK_ARGUMENTS if name in accepted), None)
        if name is None:
            raise TypeError(f"A {type(model).__name__} takes no attention mask.")
        mask = {name: attention_mask.to(device, torch.long)}
    model(token_ids.to(device), **mask)
