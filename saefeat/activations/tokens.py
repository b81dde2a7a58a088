"""Text to contexts of token ids, with the positions that count and a share held out.

Shape letters: c contexts, s positions in a context.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saefeat.activations.documents import iterate_documents, tokenise


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """Contexts of equal length, ready for a language model."""

    ids: Int[Tensor, "c s"]
    """Token ids; the last `n_held_out` contexts are held out."""
    counts: Bool[Tensor, "c s"]
    """Positions whose activations count: not padding, nor a BOS or separator put in here."""
    attention_mask: Bool[Tensor, "c s"] | None = None
    """Positions that hold a token; None where all do."""
    n_held_out: int = 0
    """Contexts at the end that training never sees."""
    prepend_bos: bool = False
    """Whether each context begins with a BOS token."""
    tokenizer_name: str = ""
    """What the tokenizer calls itself; "" where ids were given."""
    ends: Int[Tensor, "c s"] | None = None
    """Characters of the context's text up to the end of each token; -1 where a token ends inside of
    a character, or is none of the text. None unless they are from `load_aligned_tokens`."""
    text_hashes: Int[Tensor, " c"] | None = None
    """A hash of the text of each context, beside `ends`."""

    @property
    def context_size(self) -> int:
        """Positions in a context, BOS included."""
        return self.ids.shape[1]

    @property
    def n_contexts(self) -> int:
        """Contexts, held-out ones included."""
        return self.ids.shape[0]

    @property
    def n_counted(self) -> int:
        """Positions that count, over all contexts."""
        return int(self.counts.sum())

    @property
    def train(self) -> "Tokens":
        """The contexts to train on."""
        return self._part(slice(0, self.n_contexts - self.n_held_out))

    @property
    def held_out(self) -> "Tokens":
        """The contexts to measure on."""
        return self._part(slice(self.n_contexts - self.n_held_out, self.n_contexts))

    def first(self, n_contexts: int) -> "Tokens":
        """The first `n_contexts` contexts, or all if there are fewer; none of them held out."""
        return self._part(slice(0, n_contexts))

    def _part(self, contexts: slice) -> "Tokens":
        def part(one: Tensor | None) -> Tensor | None:
            return None if one is None else one[contexts]

        return replace(
            self,
            ids=self.ids[contexts],
            counts=self.counts[contexts],
            attention_mask=part(self.attention_mask),
            ends=part(self.ends),
            text_hashes=part(self.text_hashes),
            n_held_out=0,
        )


def load_tokens(
    source: Any,
    tokenizer: Any = None,
    context_size: int = 128,
    *,
    max_tokens: int | None = None,
    held_out_fraction: float = 0.1,
    prepend_bos: bool | None = None,
    seed: int = 0,
    text_column: str = "text",
    attention_mask: Bool[Tensor, "c s"] | Int[Tensor, "c s"] | None = None,
    pattern: str = "**/*",
) -> Tokens:
    """Tokenises documents and packs them into contexts.

    Documents are shuffled, then laid end to end with one separator token between them (SEP,
    else EOS, else BOS, whichever the tokenizer has first) and cut into contexts; what is left
    over at the end is dropped. BOS and separators do not count, which is decided by the
    position where they were put: the same id inside the text counts.

    The last documents are held out, as many as come nearest to `held_out_fraction`. Where no
    boundary between documents lies within a factor of two of that share, one document is
    cut in two. At least one context is held out if there are two.

    Args:
        source: The path of a text file (one document) or of a folder (each file one); a list
            of strings; rows with a column `text_column` or "input_ids" (no special tokens in
            it), such as a Hugging Face data set; or an int tensor [c, s] of contexts, taken as
            it is, in its order. Rows that can only be iterated (streaming) keep their order.
        tokenizer: A Hugging Face tokenizer; needed for text.
        context_size: Positions in a context, BOS included. A tensor brings its own.
        max_tokens: Most positions to make contexts of; what comes after is not tokenised.
        held_out_fraction: Share of the contexts that training never sees, from 0 up to 1.
        prepend_bos: Begins each context with BOS (CLS in an encoder's tokenizer). None: where
            the tokenizer has one. Of a tensor it says whether its contexts do so already;
            None: where every one of them does.
        seed: Decides the order of the documents.
        text_column: The column of a data set that holds the text.
        attention_mask: 1 where a position of the tensor holds a token, 0 for padding.
        pattern: The files of a folder that count.

    Raises:
        FileNotFoundError: There is no such file or folder, or no file matches.
        TypeError: `source` is nothing that holds documents or token ids.
        ValueError: There is no text or less than one context of it, a tokenizer or BOS is
            missing, a file is not UTF-8, or an argument is out of range.
    """
    check_share(held_out_fraction)
    if isinstance(source, Tensor):
        return _take_tensor(
            source, tokenizer, max_tokens, held_out_fraction, prepend_bos, attention_mask
        )
    if attention_mask is not None:
        raise ValueError("attention_mask goes with a tensor; packed text has no padding.")
    bos = first_id_of_contexts(tokenizer, prepend_bos)
    body_size = context_size - (bos is not None)
    check_sizes(context_size, body_size, max_tokens)
    n_wanted = None if max_tokens is None else max_tokens // context_size * body_size
    documents = iterate_documents(source, seed=seed, text_column=text_column, pattern=pattern)
    ids, is_separator, starts = _lay_out(documents, tokenizer, n_wanted)
    if len(ids) < body_size:
        raise ValueError(
            f"The text holds {len(ids)} tokens, less than the {body_size} of one context. "
            + ("Is it empty?" if len(ids) == 0 else "Give more text or a smaller context_size.")
        )
    cut = held_out_start(starts, len(ids), body_size, held_out_fraction)
    packed_ids, packed_counts = [], []
    for part in (slice(0, cut), slice(cut, None)):
        packed_ids.append(_pack(ids[part], body_size, bos if bos is not None else 0))
        packed_counts.append(_pack(~is_separator[part], body_size, False))
    first = 0 if bos is not None else 1
    return Tokens(
        ids=torch.from_numpy(np.concatenate(packed_ids)[:, first:].copy()),
        counts=torch.from_numpy(np.concatenate(packed_counts)[:, first:].copy()),
        n_held_out=len(packed_ids[1]),
        prepend_bos=bos is not None,
        tokenizer_name=getattr(tokenizer, "name_or_path", "") or "",
    )


def check_share(held_out_fraction: float) -> None:
    """Refuse what is no share of the text."""
    if not 0 <= held_out_fraction < 1:
        raise ValueError(
            f"held_out_fraction={held_out_fraction} is no share. It must be at least 0 and below "
            "1, so that something is left to train on."
        )


def check_sizes(context_size: int, body_size: int, max_tokens: int | None) -> None:
    """Refuse contexts without room for text, `body_size` being their positions besides BOS."""
    if body_size < 1 or (max_tokens is not None and max_tokens < context_size):
        raise ValueError(
            f"context_size={context_size} with max_tokens={max_tokens} leaves no room for text. "
            "A context must hold more than its BOS, and max_tokens at least one context."
        )


def first_id_of_contexts(tokenizer: Any, prepend_bos: bool | None) -> int | None:
    """The BOS that contexts begin with; None where they begin with text.

    Raises:
        ValueError: BOS is demanded of a tokenizer that has none.
    """
    bos = _bos_id(tokenizer)
    if prepend_bos and bos is None:
        raise ValueError(
            "prepend_bos=True needs a tokenizer with a BOS or CLS token, and this one has "
            "neither. Leave prepend_bos at None to do without."
        )
    return None if prepend_bos is False else bos


def _lay_out(
    documents: Any, tokenizer: Any, n_wanted: int | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], list[int]]:
    """All documents end to end, which positions are separators, and where documents start."""
    separator = separator_id(tokenizer)
    pieces: list[npt.NDArray[np.int64]] = []
    separators: list[int] = []
    starts: list[int] = []
    n_ids = 0
    current = -1
    for number, ids in tokenise(documents, tokenizer):
        if len(ids) == 0:
            continue
        if number != current:
            if starts and separator is not None:
                separators.append(n_ids)
                pieces.append(np.array([separator]))
                n_ids += 1
            starts.append(n_ids)
            current = number
        pieces.append(ids)
        n_ids += len(ids)
        if n_wanted is not None and n_ids >= n_wanted:
            break
    joined = np.concatenate(pieces)[:n_wanted] if pieces else np.empty(0, dtype=np.int64)
    is_separator = np.zeros(n_ids, dtype=bool)
    is_separator[separators] = True
    return joined, is_separator[: len(joined)], [start for start in starts if start < len(joined)]


def held_out_start(starts: list[int], n_ids: int, body_size: int, fraction: float) -> int:
    """Where the held-out part begins, a document's start if one will do; `n_ids` for none."""
    n_contexts = n_ids // body_size
    if fraction == 0 or n_contexts < 2:
        return n_ids
    n_held_out = body_size * min(max(round(fraction * n_contexts), 1), n_contexts - 1)
    boundaries = [
        start
        for start in starts
        if n_held_out <= 2 * (n_ids - start) <= 4 * n_held_out
        and body_size <= start <= n_ids - body_size
    ]
    target = n_contexts * body_size - n_held_out
    return min(boundaries, key=lambda start: abs(start - target), default=target)


def _pack(values: npt.NDArray[Any], body_size: int, first: int | bool) -> npt.NDArray[Any]:
    """[n] to [n // body_size, 1 + body_size], each row beginning with `first`."""
    rows = values[: len(values) // body_size * body_size].reshape(-1, body_size)
    return np.insert(rows, 0, first, axis=1)


def _take_tensor(
    ids: Tensor,
    tokenizer: Any,
    max_tokens: int | None,
    held_out_fraction: float,
    prepend_bos: bool | None,
    attention_mask: Tensor | None,
) -> Tokens:
    if ids.ndim != 2 or ids.numel() == 0 or ids.is_floating_point():
        raise ValueError(
            f"Token ids of shape {list(ids.shape)} and dtype {ids.dtype} are no contexts: give "
            "an int tensor [contexts, context_size] that is not empty."
        )
    n_contexts, context_size = ids.shape
    if max_tokens is not None:
        n_contexts = min(n_contexts, max_tokens // context_size)
        if n_contexts == 0:
            raise ValueError(
                f"max_tokens={max_tokens} is less than one context of {context_size} tokens."
            )
    ids = ids[:n_contexts].long()
    if attention_mask is None:
        mask, counts = None, torch.ones_like(ids, dtype=torch.bool)
    else:
        mask = attention_mask[:n_contexts].bool()
        counts = mask.clone()
    # The first position that holds a token; padding may be on the left.
    first = counts.int().argmax(dim=1, keepdim=True)
    if prepend_bos is None:
        bos = _bos_id(tokenizer)
        prepend_bos = bos is not None and bool((ids.gather(1, first) == bos).all())
    if prepend_bos:
        counts.scatter_(1, first, False)
    n_held_out = 0
    if held_out_fraction > 0 and n_contexts >= 2:
        n_held_out = min(max(round(held_out_fraction * n_contexts), 1), n_contexts - 1)
    return Tokens(
        ids=ids,
        counts=counts,
        attention_mask=mask,
        n_held_out=n_held_out,
        prepend_bos=prepend_bos,
        tokenizer_name=getattr(tokenizer, "name_or_path", "") or "",
    )


def _bos_id(tokenizer: Any) -> int | None:
    # CLS first: TransformerLens gives tokenizers without a BOS an invented one, also BERT's.
    return _first_id(tokenizer, "cls_token_id", "bos_token_id")


def separator_id(tokenizer: Any) -> int | None:
    """The token that goes between documents."""
    return _first_id(tokenizer, "sep_token_id", "eos_token_id", "bos_token_id")


def _first_id(tokenizer: Any, *names: str) -> int | None:
    ids = (getattr(tokenizer, name, None) for name in names)
    return next((int(token_id) for token_id in ids if token_id is not None), None)
