"""Training batches in random order, from a position that can be kept and gone on from.

Shape letters: n rows, d width of a hook.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from saefeat.activations.shuffle import ShuffleBuffer
from saefeat.activations.sources import Batch, LeftOut, Progress, RandomAccessSource, Source
from saefeat.core.distributed import ALONE, Ranks
from saefeat.core.records import from_json

Position = tuple[Mapping[str, Any], Mapping[str, Tensor]]
"""What `TrainingBatches.state` gives."""
_PLACE = "the position in the stream"


@runtime_checkable
class TrainingBatches(Protocol):
    """An iterator over batches that can be stopped and gone on with, to the last bit."""

    epoch: int
    """The epoch that the last batch was of, from 0."""

    @property
    def left_out(self) -> LeftOut:
        """Counts so far."""
        ...

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Where it is: facts that JSON holds, and rows that were read and not yet given."""
        ...

    def restore(self, facts: Mapping[str, Any], rows: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave for an equal stream.

        Raises:
            ValueError: The state is of another kind of stream, or not whole.
        """
        ...


class BufferedBatches:
    """Batches drawn from a buffer that is refilled from the source as it empties.

    Args:
        source: Where rows come from.
        seed: Decides the order of everything.
        batch_size: Rows in a batch.
        buffer_rows: Rows in the buffer at which batches are drawn.
        n_rows: Rows to give, over as many epochs as that takes, a batch at the end of an epoch
            being filled up from the next; None for one epoch, whose last batch may be smaller.
        with_tokens: Whether batches also hold token ids and positions.
        ranks: The processes that each batch is divided among, each of which gets its part.
        hooks: Hooks that batches hold; None for all of the source.
    """

    def __init__(
        self,
        source: Source,
        *,
        seed: int,
        batch_size: int,
        buffer_rows: int,
        n_rows: int | None,
        with_tokens: bool = False,
        ranks: Ranks = ALONE,
        hooks: Collection[str] | None = None,
    ) -> None:
        self._ranks = ranks
        self._hooks = hooks
        self._source = source
        self._seed = seed
        self._batch_size = batch_size
        self._buffer_rows = buffer_rows
        self._n_left = n_rows
        self._with_tokens = with_tokens
        self._buffer = ShuffleBuffer(buffer_rows + source.chunk_rows)
        self._begin_epoch(0, Progress())

    @property
    def left_out(self) -> LeftOut:
        """Counts so far."""
        return self._progress.left_out

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        begun: Batch = {}
        while self._n_left is None or self._n_left > 0:
            self._fill()
            if self._buffer.size == 0:
                if self._n_given == 0:
                    raise ValueError(
                        f"An epoch gave no rows: of {self.left_out.positions_read} positions all "
                        "were left out. Raise max_norm_ratio, or set it to None."
                    )
                if self._n_left is None:
                    break
                self._begin_epoch(self.epoch + 1, Progress(left_out=self.left_out))
                continue
            size = min(self._batch_size - _n_rows(begun), self._buffer.size)
            batch = self._buffer.take(size, self._generator)
            self._n_given += size
            if begun:
                batch = {name: torch.cat([begun[name], x]) for name, x in batch.items()}
            if self._n_left is None:
                return batch
            if _n_rows(batch) < min(self._batch_size, self._n_left):
                begun = batch
                continue
            batch = {name: x[: self._n_left] for name, x in batch.items()}
            n = _n_rows(batch)
            self._n_left -= n
            part = self._ranks.sharing(n).part(n)
            return {name: x[part] for name, x in batch.items()}
        raise StopIteration

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `TrainingBatches`."""
        facts = {
            "kind": "buffered",
            "epoch": self.epoch,
            "n_left": self._n_left,
            "n_given": self._n_given,
            "generator": self._generator.bit_generator.state,
            "progress": asdict(self._progress),
        }
        size = self._buffer.size
        return facts, {name: rows[:size] for name, rows in self._buffer.rows.items()}

    def restore(self, facts: Mapping[str, Any], rows: Mapping[str, Tensor]) -> None:
        """See `TrainingBatches`."""
        _check_kind(facts, "buffered")
        kept = from_json(_BufferedPosition, dict(facts), _PLACE)
        if kept.epoch < 0:
            raise ValueError(f"{_PLACE} is damaged: it is in epoch {kept.epoch}.")
        self._n_left = kept.n_left
        self._begin_epoch(kept.epoch, kept.progress)
        self._n_given = kept.n_given
        try:
            self._generator.bit_generator.state = kept.generator
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise ValueError(f"{_PLACE} has no state of a generator ({error!r}).") from None
        self._buffer = ShuffleBuffer(self._buffer.capacity)
        if rows:
            self._buffer.add(self._held(rows))

    def _begin_epoch(self, epoch: int, progress: Progress) -> None:
        self.epoch = epoch
        self._progress = progress
        self._n_given = 0
        self._generator = np.random.default_rng([self._seed, epoch])
        order = self._generator.permutation(self._source.n_items)[progress.n_items :]
        self._chunks = self._source.chunks(order, progress, self._with_tokens)

    def _fill(self) -> None:
        while self._buffer.size < self._buffer_rows:
            chunk = next(self._chunks, None)
            if chunk is None:
                return
            self._buffer.add(self._held(chunk))

    def _held(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of rows at all hooks, those that are held here."""
        kept = rows if self._hooks is None else self._hooks
        return {name: x for name, x in rows.items() if name in kept}


class RandomAccessBatches:
    """Batches of a source that gives any rows of its order: how many were given is the state.

    See `BufferedBatches`; of several processes each reads no more than its part.
    """

    def __init__(
        self,
        source: RandomAccessSource,
        *,
        seed: int,
        batch_size: int,
        n_rows: int,
        with_tokens: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self._ranks = ranks
        self._source = source
        self._seed = seed
        self._batch_size = batch_size
        self._n_rows = n_rows
        self._with_tokens = with_tokens
        self._start = 0
        self.epoch = 0
        self._left_out = LeftOut()

    @property
    def left_out(self) -> LeftOut:
        """Counts so far."""
        return self._left_out

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        stop = min(self._start + self._batch_size, self._n_rows)
        n = stop - self._start
        if n <= 0:
            raise StopIteration
        own = self._ranks.sharing(n).part(n)
        row, last_row = self._start + own.start, self._start + own.stop
        self._start = stop
        parts = []
        self.epoch = (stop - 1) // self._source.n_rows
        while row < last_row:
            epoch, first = divmod(row, self._source.n_rows)
            last = min(first + last_row - row, self._source.n_rows)
            part = self._source.shuffled_rows(
                self._seed, epoch, first, last, self.left_out, self._with_tokens
            )
            parts.append(part)
            row += last - first
        # What the others read counts too.
        self.left_out.positions_read += n - (own.stop - own.start)
        if len(parts) == 1:
            return parts[0]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `TrainingBatches`."""
        facts = {"kind": "random access", "start": self._start, "left_out": asdict(self.left_out)}
        return facts, {}

    def restore(self, facts: Mapping[str, Any], rows: Mapping[str, Tensor]) -> None:
        """See `TrainingBatches`."""
        _check_kind(facts, "random access")
        kept = from_json(_RandomAccessPosition, dict(facts), _PLACE)
        self._start, self._left_out = kept.start, kept.left_out


@dataclass(kw_only=True, slots=True)
class _BufferedPosition:
    kind: str
    epoch: int
    n_left: int | None
    n_given: int
    generator: dict[str, Any]
    progress: Progress


@dataclass(kw_only=True, slots=True)
class _RandomAccessPosition:
    kind: str
    start: int
    left_out: LeftOut


def _check_kind(facts: Mapping[str, Any], kind: str) -> None:
    if facts.get("kind") != kind:
        raise ValueError(
            f"The position is one in a {facts.get('kind')} stream, and this stream is {kind}. "
            "Go on with the kind of stream (live or from a store) that the run began with."
        )


def _n_rows(batch: Batch) -> int:
    return len(next(iter(batch.values()))) if batch else 0
