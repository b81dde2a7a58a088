"""Dictionaries that matching pursuit fits from several random starts, to see what they share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saefeat.core.devices import fastest_dtype, resolve_device
from saefeat.core.progress import progress_bar
from saefeat.dictionaries.base import Origin
from saefeat.dictionaries.matching_pursuit import MatchingPursuit, MatchingPursuitConfig
from saefeat.kernels.dispatch import choose_kernels
from saefeat.metrics.fidelity import FidelitySums
from saefeat.superposition.counting.layer_rows import LayerRows
from saefeat.training.bank_learner import BankLearner

BATCH_ROWS = 512
"""Rows of a step, at least: Adam moves an atom by about its rate a step, so that many small steps
find features in fewer rows than a few large ones."""
ROWS_PER_ATOM = 0.5
"""Rows of a step per atom, at least: the products of all atoms with each other, which each step
makes anew, then cost no more than twice those of rows and atoms."""
TOLERANCE = 0.1
"""A row stops picking atoms once what is left is shorter than this share of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """One dictionary, and how it is used on held-out rows."""

    atoms: Float[Tensor, "d_sae d_in"]
    """Of length 1."""
    offset: Float[Tensor, " d_in"]
    """The geometric median of the rows; the same for every start."""
    energy: Float[Tensor, " d_sae"]
    """Mean square of each atom's code."""
    fvu: float


def fit_pursuit(
    rows: LayerRows,
    *,
    d_sae: int,
    picks: int,
    seeds: Sequence[int],
    n_rows: int,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> list[Fit]:
    """Fit one dictionary from each seed on the same rows, and see how it codes held-out ones.

    Args:
        rows: What to fit to; they are read from the beginning.
        d_sae: Atoms of each dictionary.
        picks: Atoms that a row may pick.
        seeds: Of the random starts.
        n_rows: Rows to learn from.
        device: Where to compute.
        progress: Whether to draw a progress bar on standard error.

    Raises:
        ValueError: As for `train`.
    """
    # A row of few picks is better explained the further the offset lies: all atoms then point the
    # same way, along a cone that opens at the offset, and count as copies of each other.
    config = MatchingPursuitConfig(k=min(picks, d_sae), tolerance=TOLERANCE, freeze_offset=True)
    d_in, hook_name = rows.width, rows.name
    factor = d_sae / d_in
    batch_rows = max(BATCH_ROWS, 1 << math.ceil(math.log2(ROWS_PER_ATOM * d_sae)))
    device = resolve_device(device)
    _, kernels = choose_kernels("auto", device)
    learner = BankLearner(
        {
            (hook_name, factor, seed): MatchingPursuit(
                config, d_in, d_sae, Origin(hook_name=hook_name, expansion_factor=factor, seed=seed)
            )
            for seed in seeds
        },
        n_tokens=n_rows,
        n_steps=math.ceil(n_rows / batch_rows),
        device=device,
        kernels=kernels,
        selection_dtype=fastest_dtype(device),
    )
    with progress_bar(
        total=n_rows, unit="row", desc=f"{d_sae} atoms, {picks} picks", shown=progress
    ) as bar:
        for x in rows.batches(n_rows, batch_rows):
            learner.step({hook_name: x})
            bar.update(len(x))
    return [
        _measured(one, rows.held_out)
        for one in learner.finish().values()
        if isinstance(one, MatchingPursuit)
    ]


@torch.no_grad()
def _measured(dictionary: MatchingPursuit, held_out: Float[Tensor, "n d_in"]) -> Fit:
    energy = torch.zeros(dictionary.d_sae)
    fidelity = FidelitySums()
    for rows in held_out.split(8192):
        codes = dictionary.encode(rows)
        energy.index_add_(0, codes.latents, codes.values.square())
        fidelity.update(rows, dictionary.decode(codes))
    # Folding the scale of training in gives codes their scale, and leaves atoms at length 1.
    return Fit(
        atoms=dictionary.W_dec.detach(),
        offset=dictionary.b_dec.detach(),
        energy=energy / len(held_out),
        fvu=fidelity.fvu,
    )
