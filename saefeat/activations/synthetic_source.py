"""Rows that are made in blocks, each from its number, as a source.

Shape letters: m rows, d_in width.
"""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from saefeat.activations.sources import Chunk, LeftOut, Order, Progress, fingerprint

BLOCK_ROWS = 4096
"""Rows that are made at once, from one key."""
EPOCH_ROWS = 2**32
"""Training rows of an epoch; the next epoch has others."""


@runtime_checkable
class BlockMaker(Protocol):
    """Makes any block of `BLOCK_ROWS` rows from its number."""

    d_in: int
    """Width of a row, in float32."""

    @property
    def fingerprint(self) -> str:
        """A hash that differs where any row would."""
        ...

    @property
    def forward_bytes(self) -> int:
        """About the memory that making a block takes for a moment, besides the block itself."""
        ...

    def rows(self, part: str, seed: int, epoch: int, number: int) -> Float[Tensor, "m d_in"]:
        """The rows of a block, in new memory."""
        ...


class SyntheticSource:
    """The rows of one part; an item is a block of them. They are in random order as they are."""

    def __init__(
        self, maker: BlockMaker, hook_name: str, part: str, *, seed: int, n_rows: int
    ) -> None:
        """`seed` is the stream's."""
        self.n_rows = n_rows
        self.n_items = -(-n_rows // BLOCK_ROWS)
        self.chunk_rows = BLOCK_ROWS
        self.has_tokens = False
        self.fingerprint = fingerprint(maker.fingerprint, BLOCK_ROWS, hook_name, part, seed, n_rows)
        self.forward_bytes = maker.forward_bytes
        self.buffer_bytes = 4 * BLOCK_ROWS * maker.d_in
        self._maker = maker
        self._hook_name = hook_name
        self._part = part
        self._seed = seed
        self._last: tuple[tuple[int, int, int], Tensor] | None = None

    def chunks(
        self, order: Order, progress: Progress, with_tokens: bool = False
    ) -> Iterator[Chunk]:
        for item in order.tolist():
            rows = self._maker.rows(self._part, self._seed, 0, item)
            rows = rows[: self.n_rows - item * BLOCK_ROWS]
            progress.left_out.positions_read += len(rows)
            progress.n_items += 1
            yield {self._hook_name: rows}

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
        parts = [
            self._block(seed, epoch, block)[low:high] for block, low, high in blocks_of(start, stop)
        ]
        # A copy of even a single part, since the block is kept and a batch is the caller's.
        return {self._hook_name: torch.cat(parts)}

    def _block(self, seed: int, epoch: int, number: int) -> Float[Tensor, "m d_in"]:
        key, last = (seed, epoch, number), self._last
        if last is not None and last[0] == key:
            return last[1]
        rows = self._maker.rows(self._part, seed, epoch, number)
        self._last = key, rows
        return rows


def blocks_of(start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """The blocks that rows lie in, and of each the first and the end of its rows."""
    for block in range(start // BLOCK_ROWS, -(-stop // BLOCK_ROWS)):
        first = block * BLOCK_ROWS
        yield block, max(start - first, 0), min(stop - first, BLOCK_ROWS)
