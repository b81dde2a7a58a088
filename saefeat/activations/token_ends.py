"""At which character of a text each of its tokens ends.

Shape letters: n tokens.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

# How byte-level and SentencePiece tokenizers write a space.
SPACES = (" ", "Ġ", "▁")


def tokenise_with_ends(
    texts: Sequence[str], tokenizer: Any
) -> Iterator[tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]]:
    """Of each text the token ids, without special tokens, and the characters up to their ends.

    An end is -1 where the token ends inside of a character, or where text follows that is of no
    token and no space; then it is unknown whether that was of this token.

    Raises:
        ValueError: The tokenizer does not say which characters its tokens are of.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"A {type(tokenizer).__name__} does not say at which character each token ends. Give "
            "a fast Hugging Face tokenizer, such as AutoTokenizer.from_pretrained gives."
        )
    # verbose=False: no warning that a document is longer than the model's context.
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)
    for text, encoding in zip(texts, encoded.encodings, strict=True):
        yield np.array(encoding.ids, dtype=np.int64), _ends(text, encoding)


def _ends(text: str, encoding: Any) -> Int[np.ndarray, " n"]:
    starts, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
    # The first character of all tokens that follow: the bytes of a character are all said to be
    # the whole of it, so that one that is not its last overlaps with the next.
    following = np.minimum.accumulate(np.append(starts, len(text))[::-1])[::-1][1:]
    is_end = ends <= following
    for number in np.flatnonzero(is_end & (ends < following)):
        between = text[ends[number] : following[number]]
        # Some tokenizers drop spaces. Others cut them off what they say that a token is of.
        is_cut = ends[number] > starts[number] and encoding.tokens[number].endswith(SPACES)
        is_end[number] = between.isspace() and not is_cut
    kept = np.flatnonzero(is_end)
    # A token of no characters, such as a space put before the text, ends where another has.
    kept = kept[np.diff(ends[kept], prepend=0) > 0]
    found = np.full(len(ends), -1, dtype=np.int64)
    found[kept] = ends[kept]
    return found
