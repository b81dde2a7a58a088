"""A whole bank while it learns: one batch in, one step of every dictionary."""

import zlib
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saefeat.dictionaries.base import Dictionary
from saefeat.kernels.dispatch import Kernels
from saefeat.training.bank import Bank, Key
from saefeat.training.learner import Learner, Scratch
from saefeat.training.normalisation import ActivationScale, geometric_median

INITIAL_ROWS = 4096
"""Rows of the first batch that dictionaries are initialised from."""


class BankLearner:
    """Trains dictionaries that share batches; those of one hook share its normalised rows.

    Args:
        dictionaries: What to train by key; it is changed.
        n_tokens: Rows of the whole run.
        n_steps: Steps of the whole run.
        device: Where to compute.
        kernels: Backend of the sparse products.
        selection_dtype: Dtype of the dense product that only selects.
        trained: Whether the dictionaries are trained already and read raw activations, so
            that they are not initialised.
    """

    def __init__(
        self,
        dictionaries: Mapping[Key, Dictionary],
        *,
        n_tokens: int,
        n_steps: int,
        device: torch.device,
        kernels: Kernels,
        selection_dtype: torch.dtype,
        trained: bool = False,
    ) -> None:
        self.device = device
        self.trained = trained
        self.targets = Bank(dictionaries).targets
        self.selection_dtype = selection_dtype
        self.step_number = 0
        self.n_tokens_seen = 0
        scratch = Scratch(device)
        self.learners: dict[str, dict[Key, Learner]] = {}
        self.scales: dict[str, ActivationScale] = {}
        for key, dictionary in dictionaries.items():
            self.scales.setdefault(key[0], ActivationScale(dictionary.d_in))
            self.scales.setdefault(self.targets[key], ActivationScale(dictionary.d_out))
            self.learners.setdefault(key[0], {})[key] = Learner(
                dictionary.to(device),
                n_tokens=n_tokens,
                n_steps=n_steps,
                kernels=kernels,
                selection_dtype=selection_dtype,
                scratch=scratch,
            )

    def step(self, batch: Mapping[str, Tensor]) -> dict[Key, dict[str, float]]:
        """Make one step of every dictionary.

        Args:
            batch: Rows of raw activations for each hook, any dtype and device.

        Returns:
            What each dictionary's step measured.

        Raises:
            ValueError: An activation or a loss is not finite, or a hook is constant.
        """
        measured = {}
        scaled: dict[str, Tensor] = {}
        for hook_name in self.scales:
            x = batch[hook_name].to(self.device, torch.float32)
            scaled[hook_name] = x * self._scale(hook_name, x)
        if self.step_number == 0:
            self._begin(scaled)
        variances = {
            name: torch.linalg.vector_norm(x - x.mean(0)).square() for name, x in scaled.items()
        }
        for hook_name, learners in self.learners.items():
            for key, learner in learners.items():
                target = self.targets[key]
                terms = learner.step(
                    scaled[hook_name], scaled[target], variances[target], self.step_number
                )
                if not np.isfinite(terms["loss"]):
                    raise ValueError(
                        f"The loss of {key} is {terms['loss']} at step {self.step_number}: the "
                        f"training diverged at learning rate {terms['learning_rate']:.2g}. Pass "
                        "a config with a lower learning_rate."
                    )
                measured[key] = terms
        self.step_number += 1
        self.n_tokens_seen += len(x)
        return measured

    def finish(self) -> Bank:
        """Fold the scales in and hand the dictionaries out, on the processor, ready for use."""
        bank = {}
        for hook_name, learners in self.learners.items():
            for key, learner in learners.items():
                dictionary = learner.dictionary
                n_tokens = dictionary.origin.n_tokens + self.n_tokens_seen
                dictionary.with_origin(n_tokens=n_tokens)
                dictionary.fold_scale(
                    self.scales[hook_name].factor, self.scales[self.targets[key]].factor
                )
                dictionary.zero_grad()  # the buffers of the run
                bank[key] = dictionary.requires_grad_(False).to("cpu")
        return Bank(bank)

    def _scale(self, hook_name: str, x: Float[Tensor, "n d_in"]) -> float:
        scale = self.scales[hook_name]
        if not np.isfinite(scale.update(x)):
            raise ValueError(
                f"The activations of {hook_name} at step {self.step_number} hold NaN or infinity. "
                "The model overflowed (try dtype='float32') or the data is damaged."
            )
        if scale.norm_sum == 0:
            raise ValueError(f"All activations of {hook_name} are zero. Is the hook ever used?")
        return scale.factor

    def _begin(self, scaled: Mapping[str, Float[Tensor, "n _"]]) -> None:
        """Initialise the dictionaries from the first batch, or fit trained ones to its scale."""
        for hook_name, x in scaled.items():
            _check_that_it_varies(hook_name, x)
        sample = {name: x[:INITIAL_ROWS] for name, x in scaled.items()}
        centres = {name: geometric_median(sample[name]) for name in {*self.targets.values()}}
        for hook_name, learners in self.learners.items():
            for key, learner in learners.items():
                dictionary, target = learner.dictionary, self.targets[key]
                if self.trained:
                    dictionary.fold_decoder_norms()
                    factors = self.scales[hook_name].factor, self.scales[target].factor
                    dictionary.fold_scale(1 / factors[0], 1 / factors[1])
                    continue
                generator = torch.Generator()
                generator.manual_seed(_initial_seed(hook_name, dictionary.d_sae, key[2]))
                dictionary.initialise(generator, centres[target], sample[hook_name], sample[target])


def _check_that_it_varies(hook_name: str, x: Float[Tensor, "n d"]) -> None:
    # Rounding leaves a constant hook a variance of about the square of the last bit.
    if (x - x.mean(0)).square().sum() <= 1e-10 * x.square().sum():
        raise ValueError(
            f"The activations of {hook_name} do not vary over the first {len(x)} rows, so "
            "there is nothing to learn. Check that the hook point is not a constant (a bias, "
            "a masked position) and that the batch has more than one row."
        )


def _initial_seed(hook_name: str, d_sae: int, seed: int) -> int:
    """A seed of its own for each dictionary, whatever else is in the bank."""
    entropy = (zlib.crc32(hook_name.encode()), d_sae, seed)
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
