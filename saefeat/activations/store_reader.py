"""Reads a store: any rows of a random order, straight from the shards.

The order of an epoch is decided by (seed, epoch): blocks of neighbouring rows, of all shards, are
permuted; consecutive blocks make a window; and the rows of a window are permuted among
themselves. So the rows at any place of the order are found without those before them.

Shape letters: m rows in a chunk, n rows of a window, k blocks of a window.
"""

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
from saefeat.activations.shard_files import Blocks, FetchedBlocks, MappedShards
from saefeat.activations.sources import POSITIONS, TOKEN_IDS, Chunk, LeftOut, Order
from saefeat.activations.store_index import (
    HELD_OUT,
    SCALES,
    TRAIN,
    StoredFile,
    StoreIndex,
    check_files,
    file_hash,
    read_index,
)
from saefeat.activations.tokens import Tokens
from saefeat.core.folders import Folder, LocalFolder, RemoteFolder, open_folder

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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Order:
    key: tuple[int, int]
    """Seed and epoch."""
    blocks: Numbers
    """Blocks in their order."""
    ends: Numbers
    """Rows up to the end of each."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Window:
    key: tuple[int, int, int]
    """Seed, epoch and number, counted from 1."""
    first_row: int
    """Its first row in the order of the epoch."""
    pieces: Numbers
    """The piece of each row, in order."""
    rows: Numbers
    """Its place in the piece."""


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
        columns = np.array(starts, dtype=np.int64).reshape(-1, 2).T
        blocks = Blocks(
            shard=columns[0],
            start=columns[1],
            size=np.array([min(size, shard_rows[s] - row) for s, row in starts], dtype=np.int64),
        )
        self.n_items = len(starts)
        self.n_rows = sum(shard_rows)
        self.blocks_per_chunk = max(1, chunk_rows // size)
        self.chunk_rows = self.blocks_per_chunk * size
        self.blocks_per_window = max(1, -(-window_rows // size))
        self.has_tokens = index.has_tokens
        self._hooks = list(hooks)
        self._index = index
        self._sizes = blocks.size
        self._scales = [SCALES + hook for hook in hooks] if index.dtype == "int8" else []
        self._tokens = [TOKEN_IDS, POSITIONS] if index.has_tokens else []
        read = [*hooks, *self._scales, *self._tokens]
        self._files = (
            MappedShards(folder, index, shards, read, blocks)
            if isinstance(folder, LocalFolder)
            else FetchedBlocks(folder, index, shards, read, blocks)
        )
        self._order: _Order | None = None
        self._window: _Window | None = None

    @property
    def buffer_bytes(self) -> int:
        """Most memory that reading takes: numbers of a window's rows, and the window if fetched."""
        n_rows = min(self.blocks_per_window * self._index.block_rows, self.n_rows)
        held = self._index.row_bytes * n_rows if isinstance(self._files, FetchedBlocks) else 0
        return 16 * n_rows + held

    def chunks(self, order: Order, left_out: LeftOut, with_tokens: bool = False) -> Iterator[Chunk]:
        for first in range(0, len(order), self.blocks_per_chunk):
            blocks = order[first : first + self.blocks_per_chunk]
            self._window = None  # Its blocks make room for these.
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
        left_out.positions_read += stop - start
        chunks: list[Chunk] = []
        while start < stop:
            window = self._find_window(seed, epoch, start)
            first = start - window.first_row
            last = min(stop - window.first_row, len(window.rows))
            chunks.append(
                self._gather(window.pieces[first:last], window.rows[first:last], with_tokens)
            )
            start += last - first
        if len(chunks) == 1:
            return chunks[0]
        return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}

    def _find_window(self, seed: int, epoch: int, row: int) -> "_Window":
        """The window that holds a row of the order."""
        if self._order is None or self._order.key != (seed, epoch):
            blocks = np.random.default_rng([seed, epoch]).permutation(self.n_items)
            ends = np.cumsum(self._sizes[blocks])
            self._order = _Order(key=(seed, epoch), blocks=blocks, ends=ends)
        blocks, ends = self._order.blocks, self._order.ends
        number = int(np.searchsorted(ends, row, side="right")) // self.blocks_per_window
        # Trailing zeros do not change a seed, so windows are counted from 1.
        key = (seed, epoch, number + 1)
        if self._window is None or self._window.key != key:
            at = number * self.blocks_per_window
            inside, ahead = (
                blocks[first : first + self.blocks_per_window]
                for first in (at, at + self.blocks_per_window)
            )
            self._files.prepare(inside, ahead)
            pieces, rows = self._rows_of(inside)
            mixed = np.random.default_rng(key).permutation(len(rows))
            self._window = _Window(
                key=key,
                first_row=int(ends[at - 1]) if at else 0,
                pieces=pieces[mixed],
                rows=rows[mixed],
            )
        return self._window

    def _rows_of(self, blocks: Numbers) -> tuple[Numbers, Numbers]:
        """Piece and row within the piece, of every row of the blocks in order."""
        sizes = self._sizes[blocks]
        ends = np.cumsum(sizes)
        within = np.arange(int(sizes.sum())) - np.repeat(ends - sizes, sizes)
        pieces = np.repeat(self._files.piece[blocks], sizes)
        return pieces, within + np.repeat(self._files.offset[blocks], sizes)

    def stored(self, block: int) -> Chunk:
        """The rows of a block as they are stored, everything that belongs to them included."""
        blocks = np.array([block])
        self._files.prepare(blocks, blocks[:0])
        pieces, rows = self._rows_of(blocks)
        spans = [(int(pieces[0]), torch.from_numpy(rows))]
        names = [*self._hooks, *self._scales, *self._tokens]
        return {name: self._column(name, spans) for name in names}

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
            if self._scales:
                values = dequantise(values, self._column(SCALES + hook, spans))
            chunk[hook] = values
        if with_tokens:
            chunk |= {name: self._column(name, spans) for name in self._tokens}
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


def first_rows(
    folder: LocalFolder | RemoteFolder, index: StoreIndex, split: str, run: int
) -> Chunk | None:
    """The first rows that a run stored, a block of them, as they were encoded."""
    shards = [one for one in index.shards if (one.split, one.run) == (split, run)][:1]
    if not shards:
        return None
    check_files(folder, index)
    source = StoreSource(folder, index, shards, index.hooks, 1, 1)
    return source.stored(0)


def _held_out_tokens(folder: Folder, index: StoreIndex) -> Tokens | None:
    from safetensors.torch import load

    parts = []
    for one in index.held_out_contexts:
        data = folder.read(one.file)
        if file_hash(data) != one.blake2b:
            raise ValueError(f"{folder}/{one.file} is damaged: its hash differs from the index.")
        part = load(data)
        if not {"ids", "counts"} <= part.keys() or part["ids"].shape != part["counts"].shape:
            raise ValueError(f"{folder}/{one.file} does not hold contexts; it is damaged.")
        parts.append(part)
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
