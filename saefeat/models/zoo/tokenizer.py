"""Tokenizers for text of any language: one token a byte, or byte-pair encoding."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

END_OF_TEXT = "<|endoftext|>"
"""Ends a document and begins a context."""
BYTE_VOCABULARY = 257
"""All bytes, whose ids are their values, and the end of text, 256."""


def byte_tokenizer() -> Any:
    """A `tokenizers.Tokenizer` that gives every byte of UTF-8 its value as id."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = _bytewise(Tokenizer(BPE(vocab=vocabulary, merges=[])))
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def trained_tokenizer(documents: Sequence[bytes], vocabulary_size: int) -> Any:
    """A byte-pair encoding of the documents (Sennrich et al. 2016) with so many tokens.

    Raises:
        ValueError: The vocabulary is smaller than that of bytes, or the documents do not have as
            many tokens.
    """
    if vocabulary_size <= BYTE_VOCABULARY:
        raise ValueError(
            f"vocabulary_size={vocabulary_size}: {BYTE_VOCABULARY} stands for bytes alone, and "
            "byte-pair encoding takes more."
        )
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    tokenizer = _bytewise(Tokenizer(BPE()))
    trainer = BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=_byte_characters(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((_decoded(one) for one in documents), trainer)
    if tokenizer.get_vocab_size() != vocabulary_size:
        raise ValueError(
            f"The text has only {tokenizer.get_vocab_size():,} tokens, and vocabulary_size="
            f"{vocabulary_size:,} was asked for. Give more text or a smaller vocabulary."
        )
    return tokenizer


def encode(documents: Sequence[bytes], tokenizer: Any) -> npt.NDArray[np.int64]:
    """All documents as ids [n], each followed by the end of text."""
    end = np.array([tokenizer.token_to_id(END_OF_TEXT)])
    pieces: list[npt.NDArray[Any]] = []
    if tokenizer.get_vocab_size() == BYTE_VOCABULARY:
        for document in documents:
            pieces += [np.frombuffer(document, np.uint8), end]
    else:
        texts = [_decoded(document) for document in documents]
        for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
            pieces += [np.array(encoding.ids), end]
    return np.concatenate(pieces).astype(np.int64)


def _bytewise(tokenizer: Any) -> Any:
    from tokenizers import decoders, pre_tokenizers

    is_plain = tokenizer.get_vocab_size() > 0
    # Words matter to byte-pair encoding only, which merges nothing across them.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=not is_plain
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_characters() -> list[str]:
    """The printable characters that stand for bytes 0 to 255 in GPT-2's tokenizers.

    Bytes that are printable in Latin-1 stand for themselves, the others, in their order, for
    characters from 256 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _decoded(document: bytes) -> str:
    return document.decode("utf-8", errors="replace")
