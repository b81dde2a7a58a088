"""Finds, on a processor, operators that on a CUDA device would wait for it."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WAIT = {
    "_linalg_check_errors",
    "_local_scalar_dense",
    "_unique",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
"""Operators whose result's size or Python value depends on the data."""


class NothingWaits(TorchDispatchMode):
    """Makes each operator that would wait for the device an error.

    It does not see copies from one device to another, nor `tolist` and `numpy`, which run no
    operator on a processor; the GPU tests, under `set_sync_debug_mode`, do.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in WAIT or _indexes_by_mask(name, args) or _repeats_unknown(name, args, kwargs):
            raise RuntimeError(f"{func} would wait for the device.")
        return func(*args, **kwargs)


def _indexes_by_mask(name: str, args: Any) -> bool:
    if name not in ("index", "index_put", "index_put_", "_unsafe_index"):
        return False
    indices = [index for index in args[1] if isinstance(index, Tensor)]
    return any(index.dtype in (torch.bool, torch.uint8) for index in indices)


def _repeats_unknown(name: str, args: Any, kwargs: Any) -> bool:
    by_tensor = any(isinstance(argument, Tensor) for argument in args[-1:])
    return name == "repeat_interleave" and by_tensor and kwargs.get("output_size") is None
