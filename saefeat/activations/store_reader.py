"""Reads a store: any rows of a random order, straight from the shards.

The order of an epoch is decided by (seed, epoch): blocks of neighbouring rows, of all shards, are
permuted; consecutive blocks make a window; and the rows of a window are permuted among
themselves. So the rows at any place of the order are found without those before them.

Shape letters: m rows in a chunk, n rows of a window, k blocks of a window.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from saefeat.activations.hooks import resolve_hooks
from saefeat.activations.quantise import dequantise
from saefeat.activations.shard_files import FetchedBlocks, MappedShards
from saefeat.activations.sources import POSITIONS, TOKEN_IDS, Chunk, LeftOut, Order
from saefeat.activations.store_index import (
    HELD_OUT,
    TRAIN,
    StoredFile,
    StoreIndex,
    check_files,
    file_hash,
    read_index,
)
from saefeat.activations.store_writer import SCALES
from saefeat.activations.tokens import Tokens
from saefeat.core.folders import Folder, LocalFolder, open_folder

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenStore:
    """What a stream needs of a store."""

    index: StoreIndex
    train: "StoreSource"
    held_out: "StoreSource | None"
    tokens: Tokens | None
    """The held-out contexts, all marked as held out; None if the store has none."""
    example: Chunk
    """One row of each hook, for its width and dtype."""


def open_store_sources(
    place: str | Path,
    hooks: str | Sequence[str] | None,
    chunk_rows: int,
    window_rows: int,
    storage_options: Mapping[str, Any] | None = None,
) -> OpenStore:
    """Opens a store for `ActivationStream.from_store`, which lists the errors."""
    folder = open_folder(place, storage_options)
    index = read_index(folder)
    check_files(folder, index)
    if index.n_rows(TRAIN) == 0:
        raise ValueError(
            f"{folder} holds no training rows yet. Was its writer interrupted? Go on with "
            "cache_activations(..., resume=True)."
        )
    known = SimpleNamespace(hook_dict=index.widths)
    chosen = index.hooks if hooks is None else resolve_hooks(known, hooks)
    train, held_out = (
        StoreSource(
            folder,
            index,
            [shard for shard in index.shards if shard.split == split],
            chosen,
            chunk_rows,
            window_rows,
        )
        for split in (TRAIN, HELD_OUT)
    )
    dtype = torch.float32 if index.dtype == "int8" else getattr(torch, index.dtype)
    return OpenStore(
        index=index,
        train=train,
        held_out=held_out if held_out.n_rows else None,
        tokens=_held_out_tokens(folder, index),
        example={hook: torch.zeros(1, index.widths[hook], dtype=dtype) for hook in chosen},
    )


class StoreSource:
    """The rows of some shards; an item is a block of neighbouring rows."""

    def __init__(
        self,
        folder: Folder,
        index: StoreIndex,
        shards: Sequence[StoredFile],
        hooks: Sequence[str],
        chunk_rows: int,
        window_rows: int,
    ) -> None:
        size = index.block_rows
        shard_rows = [shard.n_rows for shard in shards]
        starts = [(s, row) for s, n in enumerate(shard_rows) for row in range(0, n, size)]
        self._shard, self._start = np.array(starts, dtype=np.int64).reshape(-1, 2).T
        self._size: Numbers = np.array(
            [min(size, shard_rows[s] - row) for s, row in starts], dtype=np.int64
        )
        self.n_items = len(starts)
        self.n_rows = sum(shard_rows)
        self.blocks_per_chunk = max(1, chunk_rows // size)
        self.chunk_rows = self.blocks_per_chunk * size
        self.blocks_per_window = max(1, -(-window_rows // size))
        self._hooks = list(hooks)
        self._index = index
        self._files = (
            MappedShards(folder, index, shards, self._shard, self._start, self._size)
            if isinstance(folder, LocalFolder)
            else FetchedBlocks(folder, index, shards, self._shard, self._start, self._size)
        )
        self._epoch: tuple[int, int, Numbers, Numbers] | None = None
        self._window: tuple[int, int, int, Numbers, Numbers] | None = None

    @property
    def buffer_bytes(self) -> int:
        """Most memory that reading takes: numbers of a window's rows, and the window if fetched."""
        n_rows = min(self.blocks_per_window * self._index.block_rows, self.n_rows)
        held = self._index.row_bytes * n_rows if isinstance(self._files, FetchedBlocks) else 0
        return 16 * n_rows + held

    def chunks(
        self, order: Order, left_out: LeftOut, with_tokens: bool = False
    ) -> Iterator[Chunk]:
        for first in range(0, len(order), self.blocks_per_chunk):
            blocks = order[first : first + self.blocks_per_chunk]
            self._files.prepare(blocks, order[first + len(blocks) :][: self.blocks_per_chunk])
            pieces, rows = self._rows_of(blocks)
            left_out.positions_read += len(rows)
            yield self._gather(pieces, rows, with_tokens)

    def shuffled_rows(
        self,
        seed: int,
        epoch: int,
        start: int,
        stop: int,
        left_out: LeftOut,
        with_tokens: bool = False,
    ) -> Chunk:
        parts: list[tuple[Numbers, Numbers]] = []
        chunks: list[Chunk] = []
        left_out.positions_read += stop - start
        while start < stop:
            number, first, pieces, rows = self._find_window(seed, epoch, start)
            last = min(first + len(rows), stop)
            parts = [(pieces[start - first : last - first], rows[start - first : last - first])]
            chunks += [self._gather(*part, with_tokens) for part in parts]
            start = last
        if len(chunks) == 1:
            return chunks[0]
        return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}

    def _find_window(
        self, seed: int, epoch: int, row: int
    ) -> tuple[int, int, Numbers, Numbers]:
        """The window that holds a row of the order: its number, its first row, and its rows."""
        if self._epoch is None or self._epoch[:2] != (seed, epoch):
            blocks = np.random.default_rng([seed, epoch]).permutation(self.n_items)
            ends = np.cumsum(self._size[blocks])
            self._epoch = (seed, epoch, blocks, ends)
        _, _, blocks, ends = self._epoch
        number = int(np.searchsorted(ends, row, side="right")) // self.blocks_per_window
        first_block = number * self.blocks_per_window
        first = int(ends[first_block - 1]) if first_block else 0
        if self._window is None or self._window[:3] != (seed, epoch, number):
            inside, ahead = (
                blocks[at : at + self.blocks_per_window]
                for at in (first_block, first_block + self.blocks_per_window)
            )
            self._files.prepare(inside, ahead)
            pieces, rows = self._rows_of(inside)
            # Trailing zeros do not change a seed, so windows are counted from 1.
            mixed = np.random.default_rng([seed, epoch, number + 1]).permutation(len(rows))
            self._window = (seed, epoch, number, pieces[mixed], rows[mixed])
        return number, first, self._window[3], self._window[4]

    def _rows_of(self, blocks: Numbers) -> tuple[Numbers, Numbers]:
        """Piece and row within the piece, of every row of the blocks in order."""
        sizes = self._size[blocks]
        ends = np.cumsum(sizes)
        within = np.arange(int(sizes.sum())) - np.repeat(ends - sizes, sizes)
        pieces = np.repeat(self._files.piece[blocks], sizes)
        return pieces, within + np.repeat(self._files.offset[blocks], sizes)

    def _gather(self, pieces: Numbers, rows: Numbers, with_tokens: bool) -> Chunk:
        """Copies rows, grouped by the piece that they lie in: one copy, and no more."""
        order = np.argsort(pieces, kind="stable")
        rows = rows[order]
        found, starts = np.unique(pieces[order], return_index=True)
        spans = [
            (int(piece), torch.from_numpy(part))
            for piece, part in zip(found, np.split(rows, starts[1:]), strict=True)
        ]
        chunk = {}
        for hook in self._hooks:
            values = self._column(hook, spans)
            if self._index.dtype == "int8":
                values = dequantise(values, self._column(SCALES + hook, spans))
            chunk[hook] = values
        if with_tokens and self._index.has_tokens:
            chunk |= {name: self._column(name, spans) for name in (TOKEN_IDS, POSITIONS)}
        return chunk

    def _column(self, name: str, spans: Sequence[tuple[int, Tensor]]) -> Tensor:
        n_rows = sum(len(rows) for _, rows in spans)
        out: Tensor | None = None
        start = 0
        for piece, rows in spans:
            values = self._files.column(piece, name)
            if out is None:
                out = values.new_empty(n_rows, *values.shape[1:])
            torch.index_select(values, 0, rows, out=out[start : start + len(rows)])
            start += len(rows)
        assert out is not None
        return out


def _held_out_tokens(folder: Folder, index: StoreIndex) -> Tokens | None:
    from safetensors.torch import load

    parts = []
    for one in index.held_out_contexts:
        data = folder.read(one.file)
        if file_hash(data) != one.blake2b:
            raise ValueError(f"{folder}/{one.file} is damaged: its hash differs from the index.")
        parts.append(load(data))
    if not parts:
        return None
    has_mask = any("attention_mask" in part for part in parts)
    masks = [part.get("attention_mask", torch.ones_like(part["counts"])) for part in parts]
    ids = torch.cat([part["ids"] for part in parts]).long()
    return Tokens(
        ids=ids,
        counts=torch.cat([part["counts"] for part in parts]),
        attention_mask=torch.cat(masks) if has_mask else None,
        n_held_out=len(ids),
        prepend_bos=bool(index.prepend_bos),
        tokenizer_name=index.tokenizer_name,
    )
