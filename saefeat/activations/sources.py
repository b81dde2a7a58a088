"""Where a stream's rows come from, chunk by chunk, before anything is shuffled among them.

Shape letters: m rows in a chunk, h hooks, d width of a hook.
"""

import copy
import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saefeat.activations.hook_reader import HookReader, ModelsReader
from saefeat.activations.tokens import Tokens
from saefeat.core.distributed import ALONE, Ranks

Chunk = dict[str, Tensor]
Batch = dict[str, Tensor]

TOKEN_IDS, POSITIONS = "token_ids", "positions"
"""Keys of a chunk that are no hooks: of each row its token, and its position in its context."""
Order = npt.NDArray[np.int64]

Wanted = Sequence[Collection[str]] | None
"""The hooks that each of several processes wants; None where all want all."""

_NORMS = "row norms"
SAMPLED_ROWS = 256
"""Rows of given tensors whose values a fingerprint takes in."""


@dataclass(kw_only=True, slots=True)
class LeftOut:
    """How many positions were read, and which of them gave no row."""

    positions_read: int = 0
    """Positions that went through the model, or rows of given tensors."""
    special_positions: int = 0
    """Of these, padding, BOS and separators."""
    outlier_rows: int = 0
    """Of the others, those left out because their norm is an outlier at one hook or more."""
    outliers: dict[str, int] = field(default_factory=dict)
    """The same by hook; a row may be an outlier at several."""


@dataclass(kw_only=True, slots=True)
class Progress:
    """How far through a source an iteration is: all that its next chunk depends on."""

    n_items: int = 0
    """Items of the epoch that were read."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """Counts of the whole iteration."""
    median_sums: list[float] = field(default_factory=list)
    """State of the epoch's `OutlierRule`: weighted sums of medians by hook, in float32."""
    median_weight: float = 0.0
    """And their weight."""


@runtime_checkable
class Source(Protocol):
    """Gives the rows of its items, an item being what can be put in any order.

    A chunk is {hook name: [m, d]} with the same rows at every hook, its tensors not reused.
    """

    n_items: int
    """Items: contexts of a text, rows of a tensor."""
    n_rows: int
    """Most rows that all items together can give."""
    chunk_rows: int
    """Most rows in a chunk."""
    has_tokens: bool
    """Whether each row is that of a token, at a position of a context."""
    fingerprint: str
    """A hash that differs where the rows or their order would; of large data, of a sample."""
    forward_bytes: int
    """About the memory that making a chunk takes for a moment, besides the chunk itself."""

    def chunks(
        self, order: Order, progress: Progress, with_tokens: bool = False
    ) -> Iterator[Chunk]:
        """The rows of the items `order` numbers, in that order.

        `progress` is gone on from and kept up to date: an iteration that stops after a chunk can
        be continued by the rest of the order and what `progress` was.

        `with_tokens` adds `token_ids` and `positions`, int32 [m], if it has tokens.
        """
        ...


@runtime_checkable
class RandomAccessSource(Source, Protocol):
    """A source that can give any rows of a random order, so that nothing need be buffered."""

    buffer_bytes: int
    """Most memory that reading takes, beside the batch itself."""

    def shuffled_rows(
        self,
        seed: int,
        epoch: int,
        start: int,
        stop: int,
        left_out: LeftOut,
        with_tokens: bool = False,
    ) -> Chunk:
        """Rows `start` up to `stop` of the order that seed and epoch decide."""
        ...


class TensorSource:
    """Rows of tensors that are given; each row is an item."""

    def __init__(self, tensors: Chunk, rows: Int[Tensor, " n"], chunk_rows: int) -> None:
        """`rows` numbers those rows of `tensors` that belong to this source."""
        self.n_items = self.n_rows = len(rows)
        self.chunk_rows = chunk_rows
        self.has_tokens = False
        sampled = rows[:: max(1, len(rows) // SAMPLED_ROWS)]
        samples = [x[sampled.to(x.device)] for x in tensors.values()]
        self.fingerprint = fingerprint(list(tensors), chunk_rows, rows, *samples)
        self.forward_bytes = 0
        self._tensors = tensors
        self._rows = rows

    def chunks(
        self, order: Order, progress: Progress, with_tokens: bool = False
    ) -> Iterator[Chunk]:
        for items in torch.from_numpy(order).split(self.chunk_rows):
            rows = self._rows[items]
            chunk = {
                hook: tensor.index_select(0, rows.to(tensor.device))
                for hook, tensor in self._tensors.items()
            }
            bad = first_non_finite(row_norms(chunk))
            if bad is not None:
                hook, row = list(chunk)[bad[0]], int(rows[bad[1]])
                raise ValueError(f"Row {row} of the tensor {hook!r} holds NaN or infinity.")
            progress.left_out.positions_read += len(rows)
            progress.n_items += len(items)
            yield chunk


class ModelSource:
    """Rows from a language model that reads contexts of a text; each context is an item."""

    def __init__(
        self,
        reader: HookReader | ModelsReader,
        tokens: Tokens,
        contexts: range,
        *,
        contexts_per_forward: int,
        max_norm_ratio: float | None,
    ) -> None:
        """`contexts` numbers those contexts of `tokens` that belong to this source."""
        self.n_items = len(contexts)
        self.n_rows = int(tokens.counts[contexts.start : contexts.stop].sum())
        self.chunk_rows = contexts_per_forward * tokens.context_size
        self.has_tokens = True
        self.fingerprint = fingerprint(
            reader.hooks,
            (contexts.start, contexts.stop, contexts_per_forward, max_norm_ratio),
            tokens.ids[contexts.start : contexts.stop],
            tokens.counts[contexts.start : contexts.stop],
            reader.weight_sample(),
        )
        self.forward_bytes = reader.forward_bytes(contexts_per_forward, tokens.context_size)
        self._reader = reader
        self._tokens = tokens
        self._contexts = torch.arange(contexts.start, contexts.stop)
        self._contexts_per_forward = contexts_per_forward
        self._max_norm_ratio = max_norm_ratio
        self._ranks = ALONE
        self._wanted: Sequence[Collection[str]] = [reader.hooks]

    def shared_by(self, ranks: Ranks, wanted: Wanted) -> "ModelSource":
        """The same source, of which several processes read the chunks in turn, for all."""
        one = copy.copy(self)
        one._ranks = ranks
        one._wanted = [self._reader.hooks] * ranks.size if wanted is None else wanted
        return one

    def chunks(
        self, order: Order, progress: Progress, with_tokens: bool = False
    ) -> Iterator[Chunk]:
        hooks, left_out = self._reader.hooks, progress.left_out
        rule = None if self._max_norm_ratio is None else OutlierRule(self._max_norm_ratio, progress)
        for contexts, positions, norms, chunk in self._read_in_turn(order):
            n_positions = len(contexts) * self._tokens.context_size
            left_out.positions_read += n_positions
            left_out.special_positions += n_positions - len(positions)
            progress.n_items += len(contexts)
            if len(positions) == 0:
                continue
            tokens = self._tokens_of(contexts, positions) if with_tokens else {}
            bad = first_non_finite(norms)
            if bad is not None:
                context = int(contexts[positions[bad[1]] // self._tokens.context_size])
                raise ValueError(
                    f"The activations at {hooks[bad[0]]} hold NaN or infinity (or are too large to "
                    f"square in float32) in context {context}. Check the model's weights, and "
                    "that its dtype has the range for its activations."
                )
            if rule is not None:
                is_outlier = rule.outliers(norms)
                kept = (~is_outlier.any(dim=0)).nonzero().squeeze(1)
                if len(kept) < len(positions):
                    left_out.outlier_rows += len(positions) - len(kept)
                    for hook, n in zip(hooks, is_outlier.sum(dim=1).tolist(), strict=True):
                        left_out.outliers[hook] = left_out.outliers.get(hook, 0) + n
                    chunk = {hook: rows.index_select(0, kept) for hook, rows in chunk.items()}
                    kept = kept.cpu()
                    tokens = {name: x.index_select(0, kept) for name, x in tokens.items()}
            yield chunk | tokens

    def _read_in_turn(self, order: Order) -> Iterator[tuple[Tensor, Tensor, Tensor, Chunk]]:
        """Contexts, their positions that count, and the norms and rows of these.

        Of several processes each reads the next of as many chunks as there are processes, and
        hands the others the hooks that they want of it.
        """
        parts = self._contexts[torch.from_numpy(order)].split(self._contexts_per_forward)
        for first in range(0, len(parts), self._ranks.size):
            turn = []
            for contexts in parts[first : first + self._ranks.size]:
                counts = self._tokens.counts[contexts].flatten()
                turn.append((contexts, counts.nonzero().squeeze(1)))
            chunks = self._ranks.exchange(self._handed_out(turn))
            for contexts, positions in turn:
                chunk = chunks.pop(0)
                yield contexts, positions, chunk.pop(_NORMS, torch.empty(0)), chunk

    def _handed_out(self, turn: Sequence[tuple[Tensor, Tensor]]) -> list[Chunk]:
        """What this process reads in a turn, for each process: the rows that it wants, and norms.

        Empty where it is not its turn, or no position counts.
        """
        if self._ranks.rank >= len(turn) or len(turn[self._ranks.rank][1]) == 0:
            return [{}] * self._ranks.size
        own = self._read(*turn[self._ranks.rank])
        norms = {_NORMS: row_norms(own)}
        if all(len(hooks) == len(own) for hooks in self._wanted):
            return [own | norms] * self._ranks.size
        return [
            {hook: own[hook] for hook in own if hook in hooks} | norms for hooks in self._wanted
        ]

    def _tokens_of(self, contexts: Tensor, positions: Tensor) -> Chunk:
        ids = self._tokens.ids[contexts].flatten().index_select(0, positions)
        return {
            TOKEN_IDS: ids.to(torch.int32),
            POSITIONS: (positions % self._tokens.context_size).to(torch.int32),
        }

    def _read(self, contexts: Tensor, positions: Tensor) -> Chunk:
        mask = self._tokens.attention_mask
        values = self._reader.read(
            self._tokens.ids[contexts], None if mask is None else mask[contexts]
        )
        return {
            hook: value.flatten(0, 1).index_select(0, positions.to(value.device))
            for hook, value in values.items()
        }


def shared(source: Source, ranks: Ranks, wanted: Wanted = None) -> Source:
    """A source that processes read together, if there is anything to be saved by that."""
    if ranks.size == 1 or not isinstance(source, ModelSource):
        return source
    return source.shared_by(ranks, wanted)


def fingerprint(*parts: object) -> str:
    """A hash of tensors, by their bytes, and of anything else, by its `repr`."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Tensor):
            whole = part.detach().cpu().contiguous()
            digest.update(f"{whole.dtype}{list(whole.shape)}".encode())
            digest.update(whole.flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()


class OutlierRule:
    """Finds rows whose norm is far above what is usual at their hook: attention sinks.

    A row is an outlier where its norm exceeds `max_norm_ratio` times the running median of
    its hook: the mean of the medians of all chunks so far, this one included, in which each
    chunk weighs 1 % more than the one before it. A median is not moved by the outliers
    themselves, whose norms were measured at 150 times the median in SmolLM2-135M.
    """

    DECAY = 0.99

    def __init__(self, max_norm_ratio: float, progress: Progress | None = None) -> None:
        """`progress` is where the running medians are gone on from, and kept."""
        self.max_norm_ratio = max_norm_ratio
        self._progress = progress or Progress()

    def outliers(self, norms: Float[Tensor, "h m"]) -> Bool[Tensor, "h m"]:
        """Which norms of the next chunk are outliers."""
        medians = norms.median(dim=1).values
        progress = self._progress
        before = torch.tensor(progress.median_sums or [0.0] * len(medians), device=medians.device)
        weighted_sum = self.DECAY * before + medians
        progress.median_weight = self.DECAY * progress.median_weight + 1.0
        running = weighted_sum / progress.median_weight
        progress.median_sums = weighted_sum.tolist()
        return norms > self.max_norm_ratio * running[:, None]


def row_norms(chunk: dict[str, Float[Tensor, "m _"]]) -> Float[Tensor, "h m"]:
    """Euclidean norm of every row at every hook, in float32."""
    # The norm is summed in float32 at least, without a float32 copy of the chunk.
    sum_dtypes = {x.dtype: torch.promote_types(x.dtype, torch.float32) for x in chunk.values()}
    norms = [torch.linalg.vector_norm(x, dim=1, dtype=sum_dtypes[x.dtype]) for x in chunk.values()]
    return torch.stack([norm.float() for norm in norms])


def first_non_finite(norms: Float[Tensor, "h m"]) -> tuple[int, int] | None:
    """Hook and row of the first norm that is NaN or infinite; None where all are finite."""
    is_finite = norms.isfinite()
    if bool(is_finite.all()):
        return None
    hook, row = (~is_finite).nonzero()[0].tolist()
    return hook, row
