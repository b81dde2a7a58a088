"""Rows of a source as batches in random order, the same tokens at every hook.

Shape letters: n rows, d width of a hook.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import torch

from saefeat.activations.batches import (
    BufferedBatches,
    Position,
    RandomAccessBatches,
    TrainingBatches,
)
from saefeat.activations.sources import (
    Batch,
    LeftOut,
    Progress,
    RandomAccessSource,
    Source,
    Wanted,
    fingerprint,
    shared,
)
from saefeat.activations.stream_checks import check_numbers, rows_to_mix
from saefeat.activations.tokens import Tokens
from saefeat.core.distributed import ALONE, Ranks


class RowStream:
    """What an `ActivationStream` is, from whatever source its rows come."""

    def __init__(
        self,
        source: Source,
        held_out_source: Source | None,
        *,
        example: Batch,
        batch_size: int,
        buffer_rows: int | None = None,
        seed: int = 0,
        model_name: str | None = None,
        tokens: Tokens | None = None,
    ) -> None:
        """Most callers want a constructor of `ActivationStream`.

        Args:
            source: The rows to train on.
            held_out_source: The rows to measure on.
            example: At least one row of each hook, for its width and dtype.
            batch_size: Rows in a batch.
            buffer_rows: Rows among which batches are drawn; None for 16 batches, and no
                fewer than 65,536. Never more than an epoch has.
            seed: Decides the order of everything.
            model_name: The language model.
            tokens: The text that it reads.

        Raises:
            ValueError: A number is out of range, or the source has no rows.
        """
        check_numbers(batch_size, seed)
        buffer_rows = rows_to_mix(batch_size, buffer_rows)
        if source.n_rows == 0:
            raise ValueError("There are no rows to train on: no position of the text counts.")
        self.hooks: list[str] = list(example)
        self.widths: dict[str, int] = {hook: x.shape[-1] for hook, x in example.items()}
        self.dtypes: dict[str, torch.dtype] = {hook: x.dtype for hook, x in example.items()}
        self.batch_size = batch_size
        self.buffer_rows = max(batch_size, min(buffer_rows, source.n_rows))
        self.seed = seed
        self.device: torch.device = next(iter(example.values())).device
        """Where the batches are."""
        self.row_bytes: dict[str, int] = {
            hook: x.shape[-1] * x.element_size() for hook, x in example.items()
        }
        """Memory of a row at each hook."""
        self.chunk_rows: int = source.chunk_rows
        """Most rows that the source gives at once."""
        self.forward_bytes: int = source.forward_bytes
        """About the memory that making them takes for a moment, besides the rows themselves."""
        self.model_name = model_name
        self.context_size: int | None = tokens.context_size if tokens else None
        self.prepend_bos: bool | None = tokens.prepend_bos if tokens else None
        self.held_out_tokens: Tokens | None = (
            tokens.held_out if tokens and tokens.n_held_out else None
        )
        self.left_out = LeftOut()
        """Counts of the iteration that was begun last, training or held out."""
        self._training: TrainingBatches | None = None
        self._source = source
        self._held_out_source = held_out_source

    @property
    def buffer_bytes(self) -> int:
        """Memory that the buffer takes while an iteration runs."""
        if isinstance(self._source, RandomAccessSource):
            return self._source.buffer_bytes
        return (self.buffer_rows + self.chunk_rows) * sum(self.row_bytes.values())

    @property
    def has_buffer(self) -> bool:
        """Whether rows are mixed in a buffer; a store's are not."""
        return not isinstance(self._source, RandomAccessSource)

    @property
    def n_rows(self) -> int:
        """Training rows of an epoch, at most: tokens that are left out are known only later."""
        return self._source.n_rows

    @property
    def n_held_out_rows(self) -> int:
        """Held-out rows, at most."""
        return 0 if self._held_out_source is None else self._held_out_source.n_rows

    @property
    def epochs_started(self) -> int:
        """Epochs that the training iteration begun last has started."""
        return 0 if self._training is None else self._training.epoch + 1

    @property
    def fingerprint(self) -> str:
        """A hash that differs where the training rows or their order would."""
        return fingerprint(self._source.fingerprint, self.seed, self.batch_size, self.buffer_rows)

    @property
    def has_tokens(self) -> bool:
        """Whether each row is that of a token, at a position of a context."""
        return self._source.has_tokens

    def __iter__(self) -> Iterator[Batch]:
        """One epoch of training batches; the last one may be smaller."""
        return self.epoch()

    def epoch(self, *, shuffle: bool = True, with_tokens: bool = False) -> Iterator[Batch]:
        """Every training row once, in batches.

        Args:
            shuffle: False gives the rows in the order of the source.
            with_tokens: Adds `token_ids` and `positions` (in the context), int32 [n], to each
                batch, if the rows have tokens.
        """
        if not shuffle:
            return self._in_order(self._source, self._source.n_rows, with_tokens)
        return self._shuffled(None, with_tokens)

    def batches(
        self,
        n_rows: int,
        position: Position | None = None,
        *,
        ranks: Ranks = ALONE,
        wanted: Wanted = None,
    ) -> TrainingBatches:
        """Training batches until `n_rows` rows are given, over as many epochs as that takes.

        Each batch has `batch_size` rows, the last what is left. A batch at the end of an
        epoch is filled up from the next one.

        Args:
            n_rows: Rows of all batches together.
            position: What `state()` of an earlier iteration gave, over an equal stream: goes on
                from there with the very batches that would have come. The rows are those of the
                hooks that are wanted here.
            ranks: Processes that iterate over equal streams in step. A language model reads a
                share of the contexts in each, and what it reads goes to all.
            wanted: Hooks of which each process gets whole batches; None gives each its part of
                every batch, at all hooks.

        Raises:
            ValueError: The position is of another kind of stream, or damaged.
        """
        batches = self._shuffled(n_rows, ranks=ranks, wanted=wanted)
        if position is not None:
            facts, rows = position
            if rows:
                (n_held,) = next(iter(rows.values())).shape[:1] or (0,)
                hooks = self.widths.keys() if wanted is None else wanted[ranks.rank]
                expected = {
                    hook: ((n_held, self.widths[hook]), self.dtypes[hook]) for hook in hooks
                }
                if {name: (tuple(x.shape), x.dtype) for name, x in rows.items()} != expected:
                    raise ValueError("The rows of the position are not those of these hooks.")
            batches.restore(facts, rows)
            self.left_out = batches.left_out
        return batches

    def _shuffled(
        self,
        n_rows: int | None,
        with_tokens: bool = False,
        ranks: Ranks = ALONE,
        wanted: Wanted = None,
    ) -> TrainingBatches:
        batches: TrainingBatches
        part_of = ranks if wanted is None else ALONE
        if isinstance(self._source, RandomAccessSource):
            batches = RandomAccessBatches(
                self._source,
                seed=self.seed,
                batch_size=self.batch_size,
                n_rows=self._source.n_rows if n_rows is None else n_rows,
                with_tokens=with_tokens,
                ranks=part_of,
            )
        else:
            batches = BufferedBatches(
                shared(self._source, ranks, wanted),
                seed=self.seed,
                batch_size=self.batch_size,
                buffer_rows=self.buffer_rows,
                n_rows=n_rows,
                with_tokens=with_tokens,
                ranks=part_of,
                hooks=None if wanted is None else wanted[ranks.rank],
            )
        self._training, self.left_out = batches, batches.left_out
        return batches

    def sample_chunks(self, n_chunks: int) -> Iterator[Batch]:
        """What the source gives first, as it gives it: not mixed, and counted nowhere.

        For timing; it takes no buffer. There may be fewer than `n_chunks`.
        """
        order = np.random.default_rng([self.seed, 0]).permutation(self._source.n_items)
        yield from itertools.islice(self._source.chunks(order, Progress()), n_chunks)

    def held_out_batches(
        self, n_rows: int | None = None, *, with_tokens: bool = False, ranks: Ranks = ALONE
    ) -> Iterator[Batch]:
        """Held-out rows in order, in batches of `batch_size` at most.

        Args:
            n_rows: Most rows to give; None gives all. There may be fewer.
            with_tokens: As for `epoch`.
            ranks: As for `batches`; each of them gets all of a batch.

        Raises:
            ValueError: Nothing was held out.
        """
        if self._held_out_source is None:
            raise ValueError(
                "Nothing was held out: the share was 0, or the text made only one context."
            )
        n_most = self._held_out_source.n_rows if n_rows is None else n_rows
        return self._in_order(shared(self._held_out_source, ranks), n_most, with_tokens)

    def _in_order(self, source: Source, n_most: int, with_tokens: bool) -> Iterator[Batch]:
        n_left = n_most
        progress = Progress()
        self.left_out = progress.left_out
        for chunk in source.chunks(np.arange(source.n_items), progress, with_tokens):
            n_chunk = len(next(iter(chunk.values())))
            for start in range(0, n_chunk, self.batch_size):
                stop = min(n_chunk, start + min(self.batch_size, n_left))
                if n_left <= 0:
                    return
                yield {name: x[start:stop] for name, x in chunk.items()}
                n_left -= stop - start
