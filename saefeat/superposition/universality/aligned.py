"""The same held-out tokens from several streams, row by row.

Shape letters: n rows.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from saefeat.activations.sources import POSITIONS, TOKEN_IDS, Batch
from saefeat.activations.stream import ActivationStream
from saefeat.activations.tokens import Tokens

CONTEXTS = "contexts"
"""Key of a batch that is no hook: of each row the number of its context."""


def aligned_batches(
    streams: Sequence[ActivationStream], n_rows: int
) -> Iterator[tuple[tuple[Batch, ...], Batch]]:
    """Held-out rows that all streams have, in order.

    A row is a token: a position of a context. Streams must read the same contexts of token ids; or
    contexts of the same text, from `load_aligned_tokens`, and then a row is a character at which a
    token of each ends. Rows that one of them leaves out as outliers are left out of the others
    too.

    Args:
        streams: Where rows come from; one that stands there twice is read once.
        n_rows: Most rows to give.

    Yields:
        The activations of each stream, the same rows in each, and of each row its `contexts`. In
        both, `token_ids` and `positions`: those of the first stream, and of each its own. A stream
        of tensors has no tokens: then the contexts are the numbers of the rows, and the rest is
        missing.

    Raises:
        ValueError: Streams read other tokens and other text, or are several and have none; or
            nothing was held out.
    """
    readers = list(dict.fromkeys(streams))
    by_ends = len(readers) > 1 and not _have_same_tokens(readers)
    rows = [_Rows(reader, n_rows if len(readers) == 1 else None, by_ends) for reader in readers]
    n_given = 0
    while n_given < n_rows and all(one.fill() for one in rows):
        last = min(int(one.keys[-1]) for one in rows)
        parts = [one.up_to(last) for one in rows]
        common = parts[0][0]
        for keys, _ in parts[1:]:
            common = common[torch.isin(common, keys)]
        common = common[: n_rows - n_given]
        if len(common) == 0:
            continue
        n_given += len(common)
        chosen = {
            reader: _rows_of(batch, torch.searchsorted(keys, common))
            for reader, (keys, batch) in zip(readers, parts, strict=True)
        }
        first = chosen[readers[0]]
        known = {name: first[name] for name in (TOKEN_IDS, POSITIONS, CONTEXTS) if name in first}
        yield tuple(chosen[stream] for stream in streams), known


class _Rows:
    """Rows of a stream that have been read and not yet given, by a key that grows."""

    def __init__(self, stream: ActivationStream, n_rows: int | None, by_ends: bool) -> None:
        self.keys: Int[Tensor, " n"] = torch.empty(0, dtype=torch.int64)
        self._has_tokens = stream.has_tokens
        self._batches = stream.held_out_batches(n_rows, with_tokens=stream.has_tokens)
        self._batch: Batch = {}
        self._places_in_context = stream.context_size or 1 << 31
        self._context, self._position, self._n_read = -1, -1, 0
        self._tokens = stream.held_out_tokens
        self._ends: Tensor | None = None
        if self._tokens is not None:
            # A context in which no position counts gives no rows.
            self._numbers = self._tokens.counts.any(1).nonzero().squeeze(1)
            if by_ends:
                self._ends, self._places_in_context = self._tokens.ends, 1 << 31

    def fill(self) -> bool:
        """Read on if nothing is left; False at the end."""
        while len(self.keys) == 0:
            batch = next(self._batches, None)
            if batch is None:
                return False
            self._batch = dict(batch)
            n = len(next(iter(batch.values())))
            if not self._has_tokens:
                self._batch[CONTEXTS] = self.keys = torch.arange(self._n_read, self._n_read + n)
                self._n_read += n
                continue
            positions = batch[POSITIONS].long()
            before = torch.cat([torch.tensor([self._position]), positions[:-1]])
            # The first row of all begins a context, since its position is not below -1.
            begins = positions <= before
            if self._context < 0:
                begins[0] = True
            contexts = self._context + begins.cumsum(0)
            self._context, self._position = int(contexts[-1]), int(positions[-1])
            places = positions
            if self._tokens is not None:
                contexts = self._checked(self._tokens, contexts, positions, batch[TOKEN_IDS])
            self._batch[CONTEXTS] = contexts
            if self._ends is not None:
                places = self._ends[contexts, positions].long()
                kept = (places >= 0).nonzero().squeeze(1)
                contexts, places = contexts[kept], places[kept]
                self._batch = _rows_of(self._batch, kept)
            self.keys = contexts * self._places_in_context + places
        return True

    def up_to(self, last: int) -> tuple[Int[Tensor, " n"], Batch]:
        """Take the rows with keys up to `last`."""
        n = int(torch.searchsorted(self.keys, last, right=True))
        taken = self.keys[:n], {name: x[:n] for name, x in self._batch.items()}
        self.keys = self.keys[n:]
        self._batch = {name: x[n:] for name, x in self._batch.items()}
        return taken

    def _checked(self, tokens: Tokens, contexts: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
        """The numbers of contexts, of those with rows, among all; their ids must be those named."""
        is_inside = bool((contexts < len(self._numbers)).all())
        if is_inside:
            contexts = self._numbers[contexts]
        if not is_inside or not torch.equal(tokens.ids[contexts, positions], ids.long()):
            raise ValueError(
                "Rows of a stream are not the held-out tokens that it names, in their order: "
                "perhaps every token of a context was left out as an outlier. Raise "
                "max_norm_ratio, or set it to None."
            )
        return contexts


def _rows_of(batch: Batch, rows: Int[Tensor, " n"]) -> Batch:
    return {name: x.index_select(0, rows.to(x.device)) for name, x in batch.items()}


def _have_same_tokens(streams: Sequence[ActivationStream]) -> bool:
    """Whether streams read the same token ids; False where it is the same text alone.

    Raises:
        ValueError: It is other text, or not known to be the same.
    """
    texts: list[Tokens] = []
    for stream in streams:
        if not stream.has_tokens or stream.held_out_tokens is None:
            raise ValueError(
                f"Rows of {len(streams)} streams are put side by side by their tokens, and one of "
                f"them (hooks {', '.join(stream.hooks[:3])}) holds out no tokens. Put activations "
                "that are given as tensors into one stream, under a name for each model."
            )
        texts.append(stream.held_out_tokens)
    first = texts[0]
    # One may hold fewer contexts, as a store does of which less was written.
    n = min(len(one.ids) for one in texts)
    other = next((one for one in texts if not torch.equal(first.ids[:n], one.ids[:n])), None)
    if other is None:
        if all(torch.equal(first.counts[:n], one.counts[:n]) for one in texts):
            return True
        raise ValueError(
            "The streams hold out the same token ids, but count other positions of them. "
            "Make both from the same Tokens."
        )
    hashes = [one.text_hashes[:n] for one in texts if one.text_hashes is not None]
    if len(hashes) == len(texts) and all(torch.equal(hashes[0], one) for one in hashes):
        return False
    names = first.tokenizer_name or "?", other.tokenizer_name or "?"
    raise ValueError(
        f"The streams hold out other token ids: {list(first.ids.shape)} and "
        f"{list(other.ids.shape)}, of tokenizers {names[0]!r} and {names[1]!r}"
        + (", and of other texts" if len(hashes) == len(texts) else "")
        + ". Latents are compared on the same tokens: make both streams from one Tokens; or, for "
        "models with different tokenizers, from those that one call of load_aligned_tokens gives, "
        "which says at which characters tokens end."
    )
