"""Text to contexts for several tokenizers, each context holding the same text for all of them.

Shape letters: t tokenizers, n tokens of one, d documents, p places where text may be cut, c
contexts, s positions in a context.
"""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saefeat.activations.documents import batched_pieces, iterate_documents
from saefeat.activations.token_ends import tokenise_with_ends
from saefeat.activations.tokens import (
    Tokens,
    check_share,
    check_sizes,
    first_id_of_contexts,
    held_out_start,
    separator_id,
)

BETWEEN_DOCUMENTS = "\x1e"
"""A character of the text that documents make end to end."""
PADDING_ID = 0
"""Where a context has no token, by its mask; a tokenizer's own may be beyond the vocabulary."""

logger = logging.getLogger(__name__)


def load_aligned_tokens(
    source: Any,
    tokenizers: Sequence[Any],
    context_size: int = 128,
    *,
    max_tokens: int | None = None,
    held_out_fraction: float = 0.1,
    prepend_bos: bool | None = None,
    seed: int = 0,
    text_column: str = "text",
    pattern: str = "**/*",
    least_aligned: float = 0.5,
) -> tuple[Tokens, ...]:
    """The same text for models with different tokenizers, which `universality` then compares.

    Documents are shuffled, laid end to end and held out as by `load_tokens`. A context is a
    stretch of that text which begins and ends where a token of every tokenizer ends, the longest
    of which no tokenizer makes more than `context_size` positions; what it makes less is padding,
    on the right. So at two tokens that end at one character of a context, models have read the
    same characters. With one tokenizer alone, contexts are those of `load_tokens`, save that
    none begins inside of a character.

    A token ends at no character where it ends inside of one (of its bytes, or of several letters
    that it is normalised to), or where text follows that is of no token and no space.

    Args:
        source: Text; see `load_tokens`.
        tokenizers: Fast Hugging Face tokenizers. Models with the same one share its `Tokens`.
        context_size: Most positions in a context, BOS included.
        max_tokens: Most positions to make contexts of, for each tokenizer.
        held_out_fraction: Share of the contexts that training never sees, from 0 up to 1.
        prepend_bos: See `load_tokens`.
        seed: Decides the order of the documents.
        text_column: The column of a data set that holds the text.
        pattern: The files of a folder that count.
        least_aligned: Share of the characters at which the tokenizer with fewest such has a token
            that ends, at which all others must have one too.

    Returns:
        One for each tokenizer, context i of each being the same text, with `ends` and
        `text_hashes`.

    Raises:
        FileNotFoundError: There is no such file or folder, or no file matches.
        TypeError: `source` is nothing that holds documents.
        ValueError: Too few tokens end together, a tokenizer is not a fast one, the documents are
            token ids; or see `load_tokens`.
    """
    if not tokenizers or not 0 <= least_aligned <= 1:
        raise ValueError(
            f"It needs a tokenizer for each model, got {len(tokenizers)}, and least_aligned from "
            f"0 to 1, got {least_aligned}."
        )
    if isinstance(source, Tensor):
        raise TypeError("A tensor of token ids has no text. Give the text that they are of.")
    check_share(held_out_fraction)
    bos_ids = [first_id_of_contexts(one, prepend_bos) for one in tokenizers]
    sizes = [context_size - (bos is not None) for bos in bos_ids]
    check_sizes(context_size, min(sizes), max_tokens)
    n_most = None if max_tokens is None else max_tokens // context_size
    documents = iterate_documents(source, seed=seed, text_column=text_column, pattern=pattern)
    text = _lay_out(documents, tokenizers, None if n_most is None else n_most * max(sizes))
    if not text.characters:
        raise ValueError("There is no text in the documents. Is the source empty?")
    places, counts = _common_places(text, least_aligned)
    last = len(places) - 1
    contexts = _cut(counts, sizes, 0, last)
    if n_most is not None and len(contexts) > n_most:
        last = int(contexts[n_most - 1, 1])
    middle = _first_held_out(
        text, places[: last + 1], counts[:, : last + 1], sizes, held_out_fraction
    )
    parts = [_cut(counts, sizes, *part) for part in ((0, middle), (middle, last))]
    contexts = np.concatenate(parts)
    if len(contexts) == 0:
        raise ValueError(
            f"The text holds {', '.join(map(str, counts[:, -1]))} tokens, less than one context of "
            f"{context_size}. Give more text or a smaller context_size."
        )
    _warn_of_gaps(places, parts)
    hashes = _hashes(text.characters, places[contexts])
    packed = []
    for tokenizer, bos, of_one, n_before in zip(
        tokenizers, bos_ids, text.tokenised, counts, strict=True
    ):
        columns = _pack(of_one, bos, n_before[contexts], places[contexts[:, 0]])
        has_token = columns.pop("attention_mask")
        packed.append(
            Tokens(
                **columns,
                attention_mask=None if has_token.all() else has_token,
                text_hashes=hashes,
                n_held_out=len(parts[1]),
                prepend_bos=bos is not None,
                tokenizer_name=getattr(tokenizer, "name_or_path", "") or "",
            )
        )
    return tuple(packed)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tokenised:
    """One tokenizer's tokens of all documents, with a separator between two if it has one."""

    ids: Int[np.ndarray, " n"]
    ends: Int[np.ndarray, " n"]
    """Characters of the whole text up to each token's end; -1 where it ends at none."""
    is_separator: Bool[np.ndarray, " n"]
    n_before: Int[np.ndarray, " d"]
    """Tokens before each document."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Text:
    """All documents end to end."""

    characters: str
    starts: Int[np.ndarray, " d"]
    """Characters before each document."""
    tokenised: list[_Tokenised]


def _lay_out(documents: Any, tokenizers: Sequence[Any], n_wanted: int | None) -> _Text:
    texts: list[str] = []
    starts: list[int] = []
    is_first: list[bool] = []
    of_each: list[list[tuple[Any, Any]]] = [[] for _ in tokenizers]
    n_characters, current = 0, -1
    for numbers, pieces in batched_pieces(enumerate(documents)):
        for number, piece in zip(numbers, pieces, strict=True):
            is_first.append(number != current)
            if number != current and current >= 0:
                texts.append(BETWEEN_DOCUMENTS)
                n_characters += 1
            current = number
            starts.append(n_characters)
            texts.append(piece)
            n_characters += len(piece)
        for encoded, tokenizer in zip(of_each, tokenizers, strict=True):
            encoded += tokenise_with_ends(pieces, tokenizer)
        n_tokens = max(sum(len(ids) for ids, _ in encoded) for encoded in of_each)
        if n_wanted is not None and n_tokens >= n_wanted:
            break
    return _Text(
        characters="".join(texts),
        starts=np.array(starts, dtype=np.int64)[np.array(is_first, dtype=bool)],
        tokenised=[
            _joined(zip(encoded, starts, is_first, strict=True), separator_id(tokenizer))
            for encoded, tokenizer in zip(of_each, tokenizers, strict=True)
        ],
    )


def _joined(
    pieces: Iterable[tuple[tuple[Any, Any], int, bool]], separator: int | None
) -> _Tokenised:
    """Tokens of pieces of text, each with where it starts and whether a document does there."""
    all_ids, all_ends = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    separators: list[int] = []
    n_before: list[int] = []
    n_tokens = 0
    for (ids, ends), start, is_first in pieces:
        if is_first and n_before and separator is not None:
            separators.append(n_tokens)
            all_ids.append(np.array([separator]))
            all_ends.append(np.array([-1]))
            n_tokens += 1
        if is_first:
            n_before.append(n_tokens)
        all_ids.append(ids)
        all_ends.append(np.where(ends < 0, -1, ends + start))
        n_tokens += len(ids)
    is_separator = np.zeros(n_tokens, dtype=bool)
    is_separator[separators] = True
    return _Tokenised(
        ids=np.concatenate(all_ids),
        ends=np.concatenate(all_ends),
        is_separator=is_separator,
        n_before=np.array(n_before, dtype=np.int64),
    )


def _common_places(
    text: _Text, least_aligned: float
) -> tuple[Int[np.ndarray, " p"], Int[np.ndarray, "t p"]]:
    """Characters before which each tokenizer has whole tokens only, and how many those are.

    They are where documents start, and where a token of every tokenizer ends.
    """
    is_common = np.ones(len(text.characters) + 1, dtype=bool)
    n_fewest = len(is_common)
    for one in text.tokenised:
        is_end = np.zeros_like(is_common)
        is_end[one.ends[one.ends >= 0]] = True
        is_common &= is_end
        n_fewest = min(n_fewest, int(is_end.sum()))
    n_common = int(is_common.sum())
    if n_common < least_aligned * n_fewest:
        raise ValueError(
            f"Tokens of all tokenizers end together at {n_common:,} characters, of the "
            f"{n_fewest:,} at which those of one end: less than least_aligned={least_aligned}. "
            "Rows that so few tokens stand for would say little of the models. Does one tokenizer "
            "leave out or rewrite much of this text, or does it have few words of this language?"
        )
    is_place = is_common.copy()
    is_place[text.starts] = True
    places = np.flatnonzero(is_place)
    counts = np.empty((len(text.tokenised), len(places)), dtype=np.int64)
    for row, one in zip(counts, text.tokenised, strict=True):
        row[np.searchsorted(places, text.starts)] = one.n_before
        ends_together = np.flatnonzero((one.ends >= 0) & is_common[one.ends])
        row[np.searchsorted(places, one.ends[ends_together])] = ends_together + 1
    return places, counts


def _cut(
    counts: Int[np.ndarray, "t p"], sizes: Sequence[int], first: int, last: int
) -> Int[np.ndarray, "c 2"]:
    """The places at which each context begins and ends, from place `first` to `last`.

    Each is as long as can be. What is left over at the end is no context, unless it is full.
    """
    contexts: list[tuple[int, int]] = []
    place = first
    while place < last:
        reach = [
            int(np.searchsorted(row, row[place] + size, side="right")) - 1
            for row, size in zip(counts, sizes, strict=True)
        ]
        stop = min(*reach, last)
        n_tokens = counts[:, stop] - counts[:, place]
        if stop == last and (n_tokens < sizes).all():
            break
        if n_tokens.all():
            contexts.append((place, stop))
        # From here no place is within reach, or none but one without a token.
        place = max(stop, place + 1)
    return np.array(contexts, dtype=np.int64).reshape(-1, 2)


def _first_held_out(
    text: _Text,
    places: Int[np.ndarray, " p"],
    counts: Int[np.ndarray, "t p"],
    sizes: Sequence[int],
    fraction: float,
) -> int:
    """The place where the held-out part begins, counted in tokens of the finest tokenizer."""
    finest = int(counts[:, -1].argmax())
    n_before, n_tokens = counts[finest], int(counts[finest, -1])
    starts = n_before[np.searchsorted(places, text.starts[text.starts <= places[-1]])]
    cut = held_out_start(starts[starts < n_tokens].tolist(), n_tokens, sizes[finest], fraction)
    return int(np.searchsorted(n_before, cut, side="right")) - 1


def _warn_of_gaps(places: Int[np.ndarray, " p"], parts: Iterable[Int[np.ndarray, "_ 2"]]) -> None:
    n_missing = sum(
        int((places[part[1:, 0]] - places[part[:-1, 1]]).sum()) for part in parts if len(part)
    )
    if n_missing:
        logger.warning(
            "Left out: %s characters of text, in which tokens of all tokenizers do not end "
            "together for longer than a context.",
            f"{n_missing:,}",
        )


def _hashes(text: str, spans: Int[np.ndarray, "c 2"]) -> Int[Tensor, " c"]:
    digests = [
        hashlib.blake2b(text[start:stop].encode(), digest_size=8).digest()
        for start, stop in spans.tolist()
    ]
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.int64)


def _pack(
    tokens: _Tokenised,
    bos: int | None,
    spans: Int[np.ndarray, "c 2"],
    starts: Int[np.ndarray, " c"],
) -> dict[str, Tensor]:
    """Contexts of the tokens `spans` number, of text that begins at the characters `starts`."""
    position = np.arange((spans[:, 1] - spans[:, 0]).max())
    number = spans[:, :1] + position
    has_token = number < spans[:, 1:]
    number[~has_token] = 0
    ends = np.where(
        has_token & (tokens.ends[number] >= 0), tokens.ends[number] - starts[:, None], -1
    )
    columns: dict[str, tuple[Any, Any]] = {
        "ids": (np.where(has_token, tokens.ids[number], PADDING_ID), bos),
        "counts": (has_token & ~tokens.is_separator[number], False),
        "attention_mask": (has_token, True),
        "ends": (ends.astype(np.int32), -1),
    }
    return {
        name: torch.from_numpy(values if bos is None else np.insert(values, 0, first, axis=1))
        for name, (values, first) in columns.items()
    }
