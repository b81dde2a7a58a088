"""Text as token ids, with its tokenizer: what a model of the zoo is trained on."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from saefeat.core.files import hash_bytes
from saefeat.models.zoo.text import Text
from saefeat.models.zoo.tokenizer import (
    BYTE_VOCABULARY,
    END_OF_TEXT,
    byte_tokenizer,
    encode,
    trained_tokenizer,
)
from saefeat.models.zoo.windows import Windows


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Tokens to train on and tokens held out."""

    train: Int[Tensor, " n"]
    """Ids, an end of text after each document."""
    held_out: Int[Tensor, " m"]
    """Ids that no training sees."""
    tokenizer: str
    """What `tokenizers.Tokenizer.from_str` reads."""
    name: str
    """What a record calls the text."""

    @property
    def vocabulary_size(self) -> int:
        """Tokens there are."""
        return int(self._tokenizer().get_vocab_size())

    @property
    def separator(self) -> int:
        """The id of the end of text."""
        return int(self._tokenizer().token_to_id(END_OF_TEXT))

    @property
    def digest(self) -> str:
        """A hash of all of it but the name."""
        ids = [hash_bytes(part.numpy().tobytes()) for part in (self.train, self.held_out)]
        return hash_bytes("".join([*ids, self.tokenizer]).encode())

    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self.tokenizer)

    def windows(self, context_size: int, seed: int) -> Windows:
        """Contexts to train on."""
        ids = self.train.numpy()
        return Windows(ids, context_size=context_size, separator=self.separator, seed=seed)

    def held_out_windows(self, context_size: int) -> Windows:
        """Contexts to measure on."""
        ids = self.held_out.numpy()
        return Windows(ids, context_size=context_size, separator=self.separator)


def tokenised(text: Text, vocabulary_size: int = BYTE_VOCABULARY) -> Corpus:
    """The text as bytes, or as so many tokens of a byte-pair encoding learnt from it.

    Raises:
        ValueError: The vocabulary is smaller than that of bytes, or the text has fewer tokens.
    """
    if vocabulary_size == BYTE_VOCABULARY:
        tokenizer = byte_tokenizer()
    else:
        tokenizer = trained_tokenizer(text.train, vocabulary_size)
    return Corpus(
        train=torch.from_numpy(np.asarray(encode(text.train, tokenizer))),
        held_out=torch.from_numpy(np.asarray(encode(text.held_out, tokenizer))),
        tokenizer=json.dumps(json.loads(tokenizer.to_str()), sort_keys=True),
        name=text.name,
    )
