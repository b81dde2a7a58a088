"""A file of safetensors into which several processes write, each its block of every tensor.

`safetensors` writes a file from tensors that one process holds whole. Here one makes the file, of
zeros, and all fill it in: no two write the same bytes, and nobody reads what another writes, so
that it takes no lock, also on a file system that machines share.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

ROWS_AT_ONCE = 64
"""Rows of a block of columns that are put in order in memory, to be written one by one."""


def allocate_tensors(path: Path, whole: Mapping[str, Tensor]) -> None:
    """Make the file.

    Args:
        path: A new file.
        whole: Float32 tensors of the shapes that the whole ones have, on the meta device.

    Raises:
        OSError: It cannot be made.
    """
    header, _, n_bytes = _layout(whole)
    with path.open("xb") as file:
        file.write(header)
        file.truncate(n_bytes)
        file.flush()
        os.fsync(file.fileno())


def write_blocks(
    path: Path, whole: Mapping[str, Tensor], blocks: Mapping[str, Tensor], first: int
) -> None:
    """Fill in some of each tensor, and return once it is on disk.

    Args:
        path: What `allocate_tensors` made.
        whole: What it was given.
        blocks: Float32 tensors on the processor, smaller than the whole in one dimension, or whole.
        first: Where along that dimension they begin.

    Raises:
        OSError: The disk is full, or fails.
    """
    _, starts, _ = _layout(whole)
    file = os.open(path, os.O_WRONLY)
    try:
        for name, block in blocks.items():
            shape = whole[name].shape
            differing = [i for i, n in enumerate(shape) if n != block.shape[i]]
            axis = differing[0] if differing else 0
            stride = 4 * math.prod(shape[axis:])
            at = starts[name] + (4 * first * math.prod(shape[axis + 1 :]) if differing else 0)
            for rows in block.flatten(0, axis - 1).split(ROWS_AT_ONCE) if axis else [block[None]]:
                for row in rows.contiguous():
                    _write(file, memoryview(row.numpy()).cast("B"), at)
                    at += stride
        os.fsync(file)
    finally:
        os.close(file)


def _layout(whole: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int], int]:
    """The header, where each tensor begins, and where the file ends."""
    entries, starts, end = {}, {}, 0
    for name, one in whole.items():
        assert one.dtype == torch.float32
        starts[name], end = end, end + 4 * one.numel()
        offsets = [starts[name], end]
        entries[name] = {"dtype": "F32", "shape": list(one.shape), "data_offsets": offsets}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + at for name, at in starts.items()}, len(header) + end


def _write(file: int, data: memoryview, at: int) -> None:
    while data:
        n_written = os.pwrite(file, data, at)
        data, at = data[n_written:], at + n_written
