"""How models of the zoo are trained."""

import math
from dataclasses import dataclass, replace

import torch

from saefeat.core.devices import fastest_dtype
from saefeat.models.zoo.shapes import Shape
from saefeat.models.zoo.tokenizer import BYTE_VOCABULARY


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingOptions:
    """AdamW with warm-up, a stable phase and a decay (Hu et al. 2024, Hägele et al. 2024).

    Raises:
        ValueError: An option is out of range.
    """

    n_tokens: int = 7_168_000
    """Tokens that are predicted, the decay's included."""
    vocabulary_size: int = BYTE_VOCABULARY
    """257 for bytes; more for a byte-pair encoding learnt from the text."""
    context_size: int = 64
    """Tokens in a context."""
    contexts_per_step: int = 16
    """Contexts in a batch."""
    learning_rate: float | None = None
    """Peak; None for 5e-3 sqrt(48 / d)."""
    warmup_steps: int = 200
    """Steps over which the rate rises, or a twentieth of the run if that is less."""
    decay_fraction: float = 0.2
    """Share of a run, its end, over which the rate falls linearly to 0."""
    weight_decay: float = 0.1
    """Of matrices; embeddings, biases and norms do not decay."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Of Adam's means."""
    largest_gradient: float = 1.0
    """Norm to which longer gradients are cut."""
    dtype: str = "auto"
    """Of matrix products: "bfloat16", "float32", or "auto" for the faster one on this machine.
    Weights, sums and the residual stream are float32."""
    n_snapshots: int = 16
    """Times the stable phase's state is written; from each it can be gone on with."""
    validation_tokens: int = 262_144
    """Most held-out tokens that a finished model's loss is measured on."""

    def __post_init__(self) -> None:
        for name in (
            *("n_tokens", "context_size", "contexts_per_step"),
            *("n_snapshots", "validation_tokens"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not above 0.")
        if self.n_tokens < 2 * self.tokens_per_step:
            raise ValueError(
                f"n_tokens={self.n_tokens:,} is less than two steps of {self.tokens_per_step:,} "
                "tokens (contexts_per_step x context_size), one stable and one of the decay."
            )
        if not 0 < self.decay_fraction < 1:
            raise ValueError(f"decay_fraction={self.decay_fraction} is not between 0 and 1.")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={self.learning_rate} is not a number above 0.")
        if self.dtype not in ("auto", "bfloat16", "float32"):
            raise ValueError(f"dtype={self.dtype!r} is not one of 'auto', 'bfloat16', 'float32'.")
        if self.vocabulary_size < BYTE_VOCABULARY:
            raise ValueError(
                f"vocabulary_size={self.vocabulary_size} is less than the {BYTE_VOCABULARY} of "
                "bytes and the end of text."
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens in a batch."""
        return self.contexts_per_step * self.context_size

    @property
    def n_stable_steps(self) -> int:
        """Steps of a whole run before its decay, the warm-up's included."""
        n_steps = self.n_tokens // self.tokens_per_step
        return n_steps - self.n_decay_steps_of_run(n_steps)

    def n_decay_steps_of_run(self, n_steps: int) -> int:
        """Steps of the decay that ends a run of so many."""
        return min(n_steps - 1, max(1, round(self.decay_fraction * n_steps)))

    def n_decay_steps(self, n_stable_steps: int) -> int:
        """Steps of a decay after so many stable ones, in the same proportion."""
        share = self.decay_fraction / (1 - self.decay_fraction)
        return max(1, round(share * n_stable_steps))

    def resolved(self, shape: Shape) -> "TrainingOptions":
        """With the rate and the dtype that a shape and this machine get."""
        dtype = self.dtype
        if dtype == "auto":
            dtype = str(fastest_dtype(torch.device("cpu"))).removeprefix("torch.")
        rate = self.learning_rate or default_learning_rate(shape)
        return replace(self, learning_rate=rate, dtype=dtype)


def default_learning_rate(shape: Shape) -> float:
    """5e-3 sqrt(48 / d).

    Of 1.5M bytes, A ends within 0.01 nats of its best for rates of 4e-3 to 6e-3, and B for
    3e-3 to 4.5e-3.
    """
    return float(5e-3 * math.sqrt(48 / shape.d_model))
