"""A whole bank while it learns: one batch in, one step of every dictionary."""

import copy
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saefeat.core.distributed import ALONE, Ranks
from saefeat.core.tensor_parts import Parts
from saefeat.dictionaries.base import Dictionary
from saefeat.dictionaries.sparse_autoencoder import SparseAutoencoder
from saefeat.kernels.dispatch import Kernels
from saefeat.training.bank import Bank, Key, dictionary_folder
from saefeat.training.learner import STEPS_BETWEEN_LOOKS, Learner, saved
from saefeat.training.normalisation import ActivationScale, geometric_median, summed_norm
from saefeat.training.shared_scores import Scratch, groups, shared_scores

INITIAL_ROWS = 4096
"""Rows of the first batch that dictionaries are initialised from."""
LEAST_VARIANCE = 1e-6
"""Of a coordinate, whose mean square is about 1 once scaled; a loss is a share of no less."""


Measured = dict[Key, dict[str, Tensor | float]]
"""What a step measured of each dictionary, by name."""


class BankLearner:
    """Trains dictionaries that share batches; those of one hook share its normalised rows.

    The hooks of a crosscoder are normalised each by itself and put side by side; their set has
    a name, by which it is here as if it were one hook.

    Args:
        dictionaries: What to train by key; it is changed.
        n_tokens: Rows of the whole run.
        n_steps: Steps of the whole run.
        device: Where to compute.
        kernels: Backend of the sparse products.
        selection_dtype: Dtype of the dense product that only selects.
        trained: Whether the dictionaries are trained already and read raw activations, so
            that they are not initialised.
        ranks: Processes that hold parts of each batch; all of them learn the same.
        feature_ranks: Processes that hold parts of each dictionary's latents.
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
        ranks: Ranks = ALONE,
        feature_ranks: Ranks = ALONE,
    ) -> None:
        self.device = device
        self.ranks = ranks
        self.trained = trained
        self.targets = Bank(dictionaries).targets
        self.groups: dict[str, dict[str, int]] = {}
        """The hooks of each set that crosscoders read, by width."""
        self.selection_dtype = selection_dtype
        self.step_number = 0
        self.n_tokens_seen = 0
        self.scratch = Scratch(device)
        self.learners: dict[str, dict[Key, Learner]] = {}
        self.scales: dict[str, ActivationScale] = {}
        self.loss_sums: dict[Key, Tensor | float] = dict.fromkeys(dictionaries, 0.0)
        """Of all steps: not finite from the first that is not."""
        for key, dictionary in dictionaries.items():
            widths = {key[0]: dictionary.d_in, self.targets[key]: dictionary.d_out}
            if dictionary.reads_several_hooks:
                widths = dictionary.origin.hook_widths or {key[0]: dictionary.d_in}
                self.groups[key[0]] = widths
            for hook_name, width in widths.items():
                self.scales.setdefault(hook_name, ActivationScale(width, device))
            self.learners.setdefault(key[0], {})[key] = Learner(
                dictionary.to(device),
                n_tokens=n_tokens,
                n_steps=n_steps,
                kernels=kernels,
                feature_ranks=feature_ranks,
            )

    def step(self, batch: Mapping[str, Tensor], n_rows: int | None = None) -> Measured:
        """Make one step of every dictionary.

        On a GPU what is not finite is noticed within 16 steps, and always before `finish`.

        Args:
            batch: Rows of raw activations for each hook, any dtype and device.
            n_rows: Rows of the whole batch, where this is a part of it; None for those given.

        Returns:
            What each dictionary's step measured, still on the device.

        Raises:
            ValueError: An activation or a loss is not finite, or a hook is constant.
        """
        looks = self.step_number % STEPS_BETWEEN_LOOKS.get(self.device.type, 1) == 0
        measured: Measured = {}
        n = len(next(iter(batch.values())))
        n_rows = n if n_rows is None else n_rows
        ranks = self.ranks.sharing(n_rows)
        raw = {
            hook_name: batch[hook_name].to(self.device, torch.float32, non_blocking=True)
            for hook_name in self.scales
        }
        norm_sums = ranks.sum_each({hook_name: summed_norm(x) for hook_name, x in raw.items()})
        scaled: dict[str, Tensor] = {}
        for hook_name, scale in self.scales.items():
            scale.add(norm_sums[hook_name], n_rows)
            scaled[hook_name] = raw.pop(hook_name) * scale.factor.float()
        for name, hooks in self.groups.items():
            scaled[name] = torch.cat([scaled[hook_name] for hook_name in hooks], dim=1)
        # Of a hook that only crosscoders read, the copy among the others is enough.
        scaled = {
            name: scaled[name] for name in dict.fromkeys((*self.learners, *self.targets.values()))
        }
        if looks:
            self._check_activations()
        if self.step_number == 0:
            self._begin({name: ranks.whole(x, n_rows) for name, x in scaled.items()})
        means = ranks.sum_each({name: x.mean(0) * (n / n_rows) for name, x in scaled.items()})
        # A last batch may have one row, or zeros alone, and then no variance to divide by. Adam's
        # step does not grow with the loss; the FVU that is logged of such a batch means nothing.
        squares = ranks.sum_each(
            {name: torch.linalg.vector_norm(x - means[name]).square() for name, x in scaled.items()}
        )
        variances = {
            name: squares[name].clamp_min(LEAST_VARIANCE * (n_rows * x.shape[1]))
            for name, x in scaled.items()
        }
        for hook_name in self.learners:
            for key, scores in self._scores(hook_name, scaled[hook_name], means[hook_name]):
                target = self.targets[key]
                measured[key] = self.learners[hook_name][key].step(
                    scaled[hook_name],
                    scaled[target],
                    variances[target],
                    self.step_number,
                    scores,
                    ranks,
                    n_rows,
                )
                self.loss_sums[key] = self.loss_sums[key] + measured[key]["loss"]
        if looks:
            self._check_losses()
        self.step_number += 1
        self.n_tokens_seen += n_rows
        return measured

    @property
    def hooks_wanted(self) -> list[set[str]] | None:
        """Hooks of which each process learns from whole batches; None where it has parts of all."""
        return None

    def of_all(self, measured: Measured) -> Measured:
        """What a step measured, as every process has it where they divide the batch."""
        return measured

    def finish(self) -> Bank:
        """Fold the scales in and hand the dictionaries out, on the processor, ready for use."""
        self._check_activations()
        self._check_losses()
        return Bank({key: self._folded(key, one.dictionary) for key, one in self._all().items()})

    def prepare_dictionaries(self, saes: Path) -> None:
        """Make, in the first process, what all fill in together by `save_dictionaries`."""

    def save_dictionaries(self, saes: Path) -> list[Path]:
        """Write what `finish` would give now, each dictionary once; the training stays as it is.

        Returns:
            The files that this process answers for.
        """
        if not self.ranks.is_first:
            return []
        self._check_activations()
        self._check_losses()
        files: list[Path] = []
        for key, learner in self._all().items():
            one = self._folded(key, copy.deepcopy(learner.dictionary))
            files += one.save(dictionary_folder(saes, key)).iterdir()
        return files

    def state(self) -> Parts:
        """All that the next step depends on, but for the batch: what this process writes of it.

        What it and another process have alike may be left to the other.
        """
        if not self.ranks.is_first:
            return {}
        state = {
            "step_number": torch.tensor(self.step_number),
            "n_tokens_seen": torch.tensor(self.n_tokens_seen),
        }
        for hook_name, scale in self.scales.items():
            state[f"scale.{hook_name}"] = scale.norm_sum
        for prefix, key, learner in self._numbered():
            state[f"{prefix}loss_sum"] = torch.as_tensor(self.loss_sums[key])
            for name, tensor in learner.state().items():
                state[prefix + name] = tensor
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what all processes gave as `state`, by whatever they were divided.

        Raises:
            ValueError: A tensor is missing, or of another shape or dtype.
        """
        self.step_number, self.n_tokens_seen = (
            int(saved(state, name, torch.tensor(0))) for name in ("step_number", "n_tokens_seen")
        )
        for hook_name, scale in self.scales.items():
            scale.norm_sum.copy_(saved(state, f"scale.{hook_name}", scale.norm_sum))
            scale.n_rows = self.n_tokens_seen
        for prefix, key, learner in self._numbered():
            loss_sum = saved(state, f"{prefix}loss_sum", torch.tensor(0.0))
            self.loss_sums[key] = loss_sum.to(self.device)
            learner.restore(state, prefix)

    def _numbered(self) -> Iterator[tuple[str, Key, Learner]]:
        """Each dictionary, with what stands before the names of its tensors in the state."""
        for number, (key, learner) in enumerate(self._all().items()):
            yield f"{number}.", key, learner

    def _all(self) -> dict[Key, Learner]:
        return {key: one for learners in self.learners.values() for key, one in learners.items()}

    def _folded(self, key: Key, dictionary: Dictionary) -> Dictionary:
        """The dictionary, changed into one that reads raw activations."""
        dictionary.with_origin(n_tokens=dictionary.origin.n_tokens + self.n_tokens_seen)
        dictionary.fold_scales(self._factors(key))
        dictionary.zero_grad()  # the buffers of the run
        return dictionary.requires_grad_(False).to("cpu")

    def _scores(
        self, hook_name: str, x: Float[Tensor, "n d_in"], mean: Float[Tensor, " d_in"]
    ) -> Iterator[tuple[Key, Tensor | None]]:
        """Each dictionary of a hook with its scores, which last until the next group's."""
        encoded: list[tuple[Key, SparseAutoencoder]] = []
        for key, learner in self.learners[hook_name].items():
            if isinstance(learner.dictionary, SparseAutoencoder):
                encoded.append((key, learner.dictionary))
            else:
                yield key, None
        centred = x - mean
        for group in groups([one.d_sae for _, one in encoded], len(x)):
            keys, dictionaries = zip(*encoded[group], strict=True)
            scores = shared_scores(dictionaries, centred, mean, self.selection_dtype, self.scratch)
            yield from zip(keys, scores, strict=True)

    def _factors(self, key: Key) -> list[float]:
        """The scales of what a dictionary reads and reconstructs, or of a crosscoder's hooks."""
        hooks = self.groups.get(key[0], (key[0], self.targets[key]))
        return [float(self.scales[hook_name].factor) for hook_name in hooks]

    def _by_hook(
        self, name: str, x: Float[Tensor, "n d_in"]
    ) -> Iterator[tuple[str, Float[Tensor, "n _"]]]:
        """The rows of a hook, or of each hook in a set."""
        widths = self.groups.get(name, {name: x.shape[1]})
        yield from zip(widths, x.split(list(widths.values()), dim=1), strict=True)

    def _check_activations(self) -> None:
        for hook_name, scale in self.scales.items():
            norm_sum = float(scale.norm_sum)
            if not np.isfinite(norm_sum):
                raise ValueError(
                    f"The activations of {hook_name} hold NaN or infinity at step "
                    f"{self.step_number} or just before. "
                    "The model overflowed (try dtype='float32') or the data is damaged."
                )
            if scale.n_rows and norm_sum == 0:
                raise ValueError(f"All activations of {hook_name} are zero. Is the hook ever used?")

    def _check_losses(self) -> None:
        for key, loss_sum in self.loss_sums.items():
            if not np.isfinite(float(loss_sum)):
                rate = self.learners[key[0]][key].peak_learning_rate
                raise ValueError(
                    f"The loss of {key} is not finite at step {self.step_number} or just before: "
                    f"the training diverged at learning rate {rate:.2g}. Pass a config with a "
                    "lower learning_rate."
                )

    def _begin(self, scaled: Mapping[str, Float[Tensor, "n _"]]) -> None:
        """Initialise the dictionaries from the first batch, or fit trained ones to its scale."""
        for name, x in scaled.items():
            for hook_name, part in self._by_hook(name, x):
                _check_that_it_varies(hook_name, part)
        sample = {name: x[:INITIAL_ROWS] for name, x in scaled.items()}
        centres = {
            name: torch.cat([geometric_median(x) for _, x in self._by_hook(name, sample[name])])
            for name in {*self.targets.values()}
        }
        for learners in self.learners.values():
            for key, learner in learners.items():
                dictionary, target = learner.dictionary, self.targets[key]
                if self.trained:
                    dictionary.fold_scales([1 / factor for factor in self._factors(key)])
                    dictionary.fold_decoder_norms()
                    continue
                self._initialise(dictionary, key, centres[target], sample)

    def _initialise(
        self,
        dictionary: Dictionary,
        key: Key,
        centre: Float[Tensor, " d_out"],
        sample: Mapping[str, Float[Tensor, "n _"]],
    ) -> None:
        generator = torch.Generator()
        generator.manual_seed(_initial_seed(key[0], dictionary.d_sae, key[2]))
        dictionary.initialise(generator, centre, sample[key[0]], sample[self.targets[key]])


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
