"""What to benchmark on: text that every machine has, and rows that look like activations."""

import sysconfig
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import saefeat as sf


def python_sources(tokenizer: Any, context_size: int = 128, **options: Any) -> sf.Tokens:
    """The sources of Python's standard library; `options` are those of `load_tokens`."""
    return sf.load_tokens(
        Path(sysconfig.get_path("stdlib")),
        tokenizer=tokenizer,
        context_size=context_size,
        pattern="**/*.py",
        **options,
    )


def structured_batches(
    n_batches: int, batch_size: int, d_in: int, *, seed: int = 0, n_active: int = 16
) -> list[Float[Tensor, "n d_in"]]:
    """Different batches of sparse sums of directions, with noise, of mean norm near √d_in.

    Each row is the sum of `n_active` of 4 d_in directions, which are drawn with probabilities
    that fall as 1 / rank, since features of a language are not equally frequent either.
    """
    generator = torch.Generator().manual_seed(seed)
    n_directions = 4 * d_in
    directions = torch.randn(n_directions, d_in, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    frequency = 1 / torch.arange(1, n_directions + 1)
    batches = []
    for _ in range(n_batches):
        active = torch.multinomial(
            frequency.expand(batch_size, -1), n_active, replacement=False, generator=generator
        )
        strength = 1 + torch.rand(batch_size, n_active, generator=generator)
        x = torch.nn.functional.embedding_bag(
            active, directions, per_sample_weights=strength, mode="sum"
        )
        x += 0.5 * d_in**-0.5 * torch.randn(batch_size, d_in, generator=generator)
        batches.append(x * (d_in**0.5 / x.norm(dim=1).mean()))
    return batches
