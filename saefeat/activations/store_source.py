"""The rows of a store as a source: any rows of a random order, straight from the shards.

The order of an epoch is decided by (seed, epoch): blocks of neighbouring rows, of all shards, are
permuted. That is all for a store that was written in random order. In another, consecutive blocks
make a window, and the rows of a window are permuted among themselves. Either way the rows at any
place of the order are found without those before them.

Shape letters: m rows in a chunk, n rows of a window, k blocks of a window.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saefeat.activations.quantise import dequantise
from saefeat.activations.shard_files import (
    TORCH_DTYPES,
    Blocks,
    FetchedBlocks,
    MappedShards,
    Numbers,
)
from saefeat.activations.sources import (
    POSITIONS,
    TOKEN_IDS,
    Chunk,
    LeftOut,
    Order,
    Progress,
    fingerprint,
)
from saefeat.activations.store_index import SCALES, StoredFile, StoreIndex
from saefeat.core.folders import LocalFolder, RemoteFolder

LEAST_BLOCKS = 64
"""Blocks that a store has at least, if it has as many rows."""

Span = tuple[int, slice | Tensor]
"""A piece, and rows of it."""


class StoreSource:
    """The rows of some shards; an item is a block of neighbouring rows."""

    def __init__(
        self,
        folder: LocalFolder | RemoteFolder,
        index: StoreIndex,
        shards: Sequence[StoredFile],
        hooks: Sequence[str],
        *,
        chunk_rows: int,
        window_rows: int | None,
    ) -> None:
        """`window_rows` are mixed with each other; None mixes blocks alone."""
        shard_rows = [shard.n_rows for shard in shards]
        self.n_rows = sum(shard_rows)
        # Of a small store a block is a smaller part, so that there are some to mix.
        size = max(1, min(index.block_rows, self.n_rows // LEAST_BLOCKS))
        starts = [(s, row) for s, n in enumerate(shard_rows) for row in range(0, n, size)]
        columns = np.array(starts, dtype=np.int64).reshape(-1, 2).T
        blocks = Blocks(
            shard=columns[0],
            start=columns[1],
            size=np.array([min(size, shard_rows[s] - row) for s, row in starts], dtype=np.int64),
        )
        self.n_items = len(starts)
        self.has_tokens = index.has_tokens
        hashes = [shard.blake2b for shard in shards]
        self.fingerprint = fingerprint(hashes, list(hooks), chunk_rows, window_rows)
        self._blocks_per_chunk = max(1, chunk_rows // size)
        self.chunk_rows = self._blocks_per_chunk * size
        self.forward_bytes = 0
        self._blocks_per_window = -(-(window_rows or chunk_rows) // size)
        self._is_mixed = window_rows is not None
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
        """Most memory that reading takes: the numbers of a window's rows, or a fetched window."""
        n_rows = min(self._blocks_per_window * int(self._sizes.max(initial=0)), self.n_rows)
        numbers = 16 * n_rows if self._is_mixed else 0
        # A batch that spans two windows in blocks needs one block more.
        fetched = (n_rows + int(self._sizes.max(initial=0))) * self._index.row_bytes
        return numbers + (fetched if isinstance(self._files, FetchedBlocks) else 0)

    def chunks(
        self, order: Order, progress: Progress, with_tokens: bool = False
    ) -> Iterator[Chunk]:
        for first in range(0, len(order), self._blocks_per_chunk):
            blocks = order[first : first + self._blocks_per_chunk]
            self._window = None  # Its blocks make room for these.
            self._files.prepare(blocks, order[first + len(blocks) :][: self._blocks_per_chunk])
            spans = self._spans_of(blocks)
            n_rows = int(self._sizes[blocks].sum())
            progress.left_out.positions_read += n_rows
            progress.n_items += len(blocks)
            chunk = self._new_chunk(n_rows, with_tokens)
            self._copy(spans, chunk, 0)
            yield self._decoded(chunk)

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
        chunk = self._new_chunk(stop - start, with_tokens)
        row = start
        while row < stop:
            if self._is_mixed:
                window = self._find_window(seed, epoch, row)
                first = row - window.first_row
                last = min(stop - window.first_row, len(window.rows))
                n_rows = last - first
                spans: Sequence[Span] = _grouped(window.pieces[first:last], window.rows[first:last])
            else:
                spans, n_rows = self._next_blocks(seed, epoch, row, stop)
            self._copy(spans, chunk, row - start)
            row += n_rows
        return self._decoded(chunk)

    def stored(self, block: int) -> Chunk:
        """The rows of a block as they are stored, everything that belongs to them included."""
        blocks = np.array([block])
        self._files.prepare(blocks, blocks[:0])
        chunk = self._new_chunk(int(self._sizes[block]), with_tokens=True)
        self._copy(self._spans_of(blocks), chunk, 0)
        return chunk

    def _find_order(self, seed: int, epoch: int) -> "_Order":
        if self._order is None or self._order.key != (seed, epoch):
            blocks = np.random.default_rng([seed, epoch]).permutation(self.n_items)
            ends = np.cumsum(self._sizes[blocks])
            self._order = _Order(key=(seed, epoch), blocks=blocks, ends=ends)
        return self._order

    def _next_blocks(
        self, seed: int, epoch: int, row: int, stop: int
    ) -> tuple[list[tuple[int, slice]], int]:
        """From a row of the order on, up to another, as far as it is prepared at once."""
        order = self._find_order(seed, epoch)
        at = int(np.searchsorted(order.ends, row, side="right"))
        end = int(np.searchsorted(order.ends, stop - 1, side="right")) + 1
        end = min(end, at + self._blocks_per_window)
        blocks = order.blocks[at:end]
        self._files.prepare(blocks, order.blocks[end : end + self._blocks_per_window])
        spans = self._spans_of(blocks)
        ends = order.ends[at:end]
        stop = min(stop, int(ends[-1]))
        # The first block may have been begun, and the last may be left unfinished.
        piece, rows = spans[-1]
        spans[-1] = (piece, slice(rows.start, rows.stop - (int(ends[-1]) - stop)))
        piece, rows = spans[0]
        begun = row - int(ends[0] - self._sizes[blocks[0]])
        spans[0] = (piece, slice(rows.start + begun, rows.stop))
        return spans, stop - row

    def _find_window(self, seed: int, epoch: int, row: int) -> "_Window":
        """The window that holds a row of the order, its rows permuted."""
        order = self._find_order(seed, epoch)
        number = int(np.searchsorted(order.ends, row, side="right")) // self._blocks_per_window
        # Trailing zeros do not change a seed, so windows are counted from 1.
        key = (seed, epoch, number + 1)
        if self._window is None or self._window.key != key:
            at = number * self._blocks_per_window
            inside, ahead = (
                order.blocks[first : first + self._blocks_per_window]
                for first in (at, at + self._blocks_per_window)
            )
            self._files.prepare(inside, ahead)
            sizes = self._sizes[inside]
            within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            rows = within + np.repeat(self._files.offset[inside], sizes)
            mixed = np.random.default_rng(key).permutation(len(rows))
            self._window = _Window(
                key=key,
                first_row=int(order.ends[at - 1]) if at else 0,
                pieces=np.repeat(self._files.piece[inside], sizes)[mixed],
                rows=rows[mixed],
            )
        return self._window

    def _spans_of(self, blocks: Numbers) -> list[tuple[int, slice]]:
        starts = self._files.offset[blocks]
        stops = starts + self._sizes[blocks]
        return [
            (piece, slice(start, stop))
            for piece, start, stop in zip(
                self._files.piece[blocks].tolist(), starts.tolist(), stops.tolist(), strict=True
            )
        ]

    def _new_chunk(self, n_rows: int, with_tokens: bool) -> Chunk:
        columns = self._index.columns(n_rows)
        names = [*self._hooks, *self._scales, *(self._tokens if with_tokens else [])]
        return {
            name: torch.empty(columns[name][1], dtype=TORCH_DTYPES[columns[name][0]])
            for name in names
        }

    def _copy(self, spans: Sequence[Span], chunk: Chunk, first: int) -> None:
        """Copies rows from where they are stored into place: once, and nothing else is held."""
        for name, out in chunk.items():
            at = first
            for piece, rows in spans:
                values = self._files.column(piece, name)
                if isinstance(rows, slice):
                    n_rows = rows.stop - rows.start
                    out[at : at + n_rows].copy_(values[rows])
                else:
                    n_rows = len(rows)
                    torch.index_select(values, 0, rows, out=out[at : at + n_rows])
                at += n_rows

    def _decoded(self, chunk: Chunk) -> Chunk:
        for hook, scales in zip(self._hooks, self._scales, strict=False):
            chunk[hook] = dequantise(chunk[hook], chunk.pop(scales))
        return chunk


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


def _grouped(pieces: Numbers, rows: Numbers) -> list[Span]:
    """Rows by the piece that they lie in, so that each piece is read by one call."""
    order = np.argsort(pieces, kind="stable")
    found, starts = np.unique(pieces[order], return_index=True)
    parts = np.split(rows[order], starts[1:])
    return [(int(piece), torch.from_numpy(part)) for piece, part in zip(found, parts, strict=True)]
