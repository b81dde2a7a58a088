"""How many weights the blocks of a model have."""

import re
from typing import Any


def n_block_weights(model: Any) -> int:
    """N of a TransformerLens model: the weight matrices of its blocks.

    Neither embeddings and unembedding nor biases and norms (Kaplan et al. 2020, section 2.1).
    """
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if _IN_A_BLOCK.search(name) and parameter.ndim >= 2 and not _LEFT_OUT.search(name)
    )


_IN_A_BLOCK = re.compile(r"\.\d+\.")
_LEFT_OUT = re.compile(r"\.b(ias|_\w+)$|\.qkv\.")
"""Biases, which have a row for each head; and a joint projection: a TransformerBridge has its three
parts beside it."""
