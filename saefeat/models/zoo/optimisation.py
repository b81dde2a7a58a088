"""One model's weights and optimizer, and how a step changes them.

The batch of a step follows from the seed and the step's number alone, so that weights, Adam's
means and the number are all there is to a run's state.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from saefeat.models.zoo.corpus import Corpus
from saefeat.models.zoo.decoder import initial_weights
from saefeat.models.zoo.network import Network
from saefeat.models.zoo.options import TrainingOptions
from saefeat.models.zoo.shapes import Shape

VALIDATION_CONTEXTS = 16
"""Held-out contexts in a batch."""


class Optimisation:
    """A model at a step of its stable phase or of a decay.

    Args:
        options: With rate and dtype resolved.
    """

    def __init__(
        self, shape: Shape, corpus: Corpus, *, seed: int, options: TrainingOptions
    ) -> None:
        assert options.learning_rate is not None
        self.step_number = 0
        self._options, self._rate = options, options.learning_rate
        sizes: dict[str, Any] = {
            "vocabulary_size": corpus.vocabulary_size,
            "context_size": options.context_size,
        }
        self.weights = initial_weights(shape, seed=seed, **sizes)
        self._network = Network(
            shape,
            self.weights,
            n_contexts=options.contexts_per_step,
            dtype=getattr(torch, options.dtype),
            **sizes,
        )
        self._validator = Network(
            shape,
            self.weights,
            n_contexts=VALIDATION_CONTEXTS,
            dtype=torch.float32,
            backward=False,
            **sizes,
        )
        self._windows = corpus.windows(options.context_size, seed)
        self._held_out = corpus.held_out_windows(options.context_size)
        if self._held_out.n_contexts < VALIDATION_CONTEXTS:
            raise ValueError(
                f"{len(corpus.held_out):,} tokens are held out, and {VALIDATION_CONTEXTS + 1} "
                f"contexts of {options.context_size} are the least. Give more text, or hold more "
                "of it out."
            )
        n_matrices, gradient = self._network.n_matrix_weights, self._network.gradient
        self._parts = [torch.nn.Parameter(self.weights[:n_matrices])]
        self._parts += [torch.nn.Parameter(self.weights[n_matrices:])]
        self._parts[0].grad, self._parts[1].grad = gradient[:n_matrices], gradient[n_matrices:]
        groups = [
            {"params": [self._parts[0]], "weight_decay": options.weight_decay},
            {"params": [self._parts[1]], "weight_decay": 0.0},
        ]
        self._adam = torch.optim.AdamW(groups, lr=self._rate, betas=options.betas, fused=True)

    def warmup_factor(self) -> float:
        """The share of the peak rate at the next step of the stable phase."""
        options = self._options
        n_warmup = min(options.warmup_steps, options.n_stable_steps // 20)
        return min(1.0, (self.step_number + 1) / (n_warmup + 1))

    def step(self, factor: float) -> float:
        """Makes a step at a share of the peak rate, and returns the loss before it, in nats.

        Raises:
            FloatingPointError: The loss is NaN or infinite.
        """
        options = self._options
        batch = self._windows.batch(self.step_number, options.contexts_per_step)
        loss = self._network.loss_and_gradient(*batch)
        gradient = self._network.gradient
        length = float(torch.linalg.vector_norm(gradient))
        if not math.isfinite(loss) or not math.isfinite(length):
            raise FloatingPointError(
                f"Training broke down at step {self.step_number}: the loss is {loss} and the "
                f"gradient's norm {length}, at a learning rate of {self._rate * factor:.3g}. The "
                "rate is probably too high; set learning_rate lower."
            )
        if length > options.largest_gradient:
            gradient.mul_(options.largest_gradient / length)
        for group in self._adam.param_groups:
            group["lr"] = self._rate * factor
        self._adam.step()
        self.step_number += 1
        return loss

    def validation_loss(self, most_tokens: int) -> float:
        """Mean loss in float32 on held-out contexts, in nats a token."""
        n_held_out = self._held_out.n_contexts // VALIDATION_CONTEXTS
        per_batch = VALIDATION_CONTEXTS * self._options.context_size
        n_batches = max(1, min(n_held_out, most_tokens // per_batch))
        losses = [
            self._validator.loss(
                *self._held_out.in_order(VALIDATION_CONTEXTS, first=i * VALIDATION_CONTEXTS)
            )
            for i in range(n_batches)
        ]
        return sum(losses) / n_batches

    def state(self) -> dict[str, Tensor]:
        """Copies of all that the next step depends on."""
        state = {"weights": self.weights.clone(), "step": torch.tensor(self.step_number)}
        for place, part in enumerate(self._parts):
            for name, value in self._adam.state[part].items():
                state[f"adam.{place}.{name}"] = value.clone()
        return state

    def restore(self, state: dict[str, Tensor]) -> None:
        """Goes back, or on, to what `state` gave."""
        self.weights.copy_(state["weights"])
        self.step_number = int(state["step"])
        self._adam.state.clear()
        for key, value in state.items():
            if key.startswith("adam."):
                _, place, name = key.split(".")
                self._adam.state[self._parts[int(place)]][name] = value.clone()


@contextmanager
def one_thread() -> Iterator[None]:
    """Has torch compute with one thread for a while.

    Products of models this small gain nothing by more, and sums come out the same everywhere.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
