"""From counts of layers to one number for each model, or to why there is none.

Shape letters: n replicates of a shape, l layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from saefeat.study.observations import LayerObservation
from saefeat.study.rules import Rules
from saefeat.study.statistics import NORMAL_95

ROUNDS = 50
"""In which rows and columns are fitted in turn; far more than a few gaps need."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Replicate:
    """One model, by means over its layers."""

    shape_label: str
    model_seed: int
    features_per_neuron: float
    """psi."""
    low: float
    high: float
    """psi by the ends of the intervals of the counts."""
    features_per_layer: float
    load: float
    l0: float
    n_layers: int
    n_filled: int
    """Layers that could not be counted, and were given what their shape lets expect."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapeCounts:
    """The replicates of a shape, and whether they can be gone by."""

    shape_label: str
    replicates: tuple[Replicate, ...]
    """Empty where `reasons` says why."""
    reasons: tuple[str, ...]
    n_counted: int
    """Layers of models that were counted,"""
    n_layers: int
    """of so many."""
    at_least: float
    """Features per neuron, by the low ends of all layers' counts."""
    n_neurons: float | None
    """Of a layer, where it was counted; None if no layer was."""

    def values(self, of: Callable[[Replicate], float]) -> Float[np.ndarray, " n"]:
        """A number of each replicate."""
        return np.array([of(one) for one in self.replicates])

    @property
    def count_sd(self) -> float:
        """Standard deviation of ln psi that the intervals of the counts allow for.

        As if the counts of all replicates were off together: they are of layers that are equally
        full, and what is wrong with an instrument is wrong with it each time.
        """
        sides = [
            max(
                np.log(one.high / one.features_per_neuron),
                np.log(one.features_per_neuron / one.low),
            )
            for one in self.replicates
        ]
        return float(np.mean(sides)) / NORMAL_95 if sides else 0.0


def is_counted(layer: LayerObservation, rules: Rules) -> bool:
    """Whether a count is a number to go by, and not a lower bound."""
    return (
        layer.identifiable
        and layer.high is not None
        and layer.low > 0
        and layer.coverage >= rules.least_coverage
    )


def shape_counts(shape_label: str, layers: Sequence[LayerObservation], rules: Rules) -> ShapeCounts:
    """The replicates of a shape, from the layers of its models at one site by one instrument.

    A layer that could not be counted is given what the same layer of the other replicates has,
    times how the replicate compares with them in its other layers: with layers left out, a
    replicate would be an average over other layers than the next. That takes layers that fail by
    chance. Where too many fail, or one nearly always, nothing is filled: the shape is
    unmeasurable.

    Args:
        shape_label: The shape.
        layers: One observation for each layer of each model; those of other shapes are left out.
        rules: What is enough.
    """
    own = {(one.model_seed, one.layer): one for one in layers if one.shape_label == shape_label}
    seeds = sorted({seed for seed, _ in own})
    numbers = sorted({layer for _, layer in own})
    counted = np.array(
        [
            [(seed, layer) in own and is_counted(own[seed, layer], rules) for layer in numbers]
            for seed in seeds
        ],
        dtype=bool,
    ).reshape(len(seeds), len(numbers))
    # Half of a replicate's layers, and half of the replicates of a layer, or it cannot be filled.
    kept = [i for i in range(len(seeds)) if counted[i].mean() >= 0.5]
    reasons = _reasons(shape_label, own, counted, numbers, kept, rules)
    lows = [one.low / one.n_neurons for one in own.values()]
    replicates: list[Replicate] = []
    if not reasons:
        tables = {
            name: _filled(
                np.array(
                    [
                        [
                            of(own[seeds[i], layer]) if counted[i, j] else np.nan
                            for j, layer in enumerate(numbers)
                        ]
                        for i in kept
                    ]
                )
            )
            for name, of in _NUMBERS.items()
        }
        replicates = [
            Replicate(
                shape_label=shape_label,
                model_seed=seeds[i],
                n_layers=len(numbers),
                n_filled=int((~counted[i]).sum()),
                **{name: float(table[row].mean()) for name, table in tables.items()},
            )
            for row, i in enumerate(kept)
        ]
    return ShapeCounts(
        shape_label=shape_label,
        replicates=tuple(replicates),
        reasons=tuple(reasons),
        n_counted=int(counted.sum()),
        n_layers=counted.size,
        at_least=float(np.mean(lows)) if lows else 0.0,
        n_neurons=float(np.mean([one.n_neurons for one in own.values()])) if own else None,
    )


_NUMBERS: dict[str, Callable[[LayerObservation], float]] = {
    "features_per_neuron": lambda one: one.estimate / one.n_neurons,
    "low": lambda one: one.low / one.n_neurons,
    "high": lambda one: (one.high or 0.0) / one.n_neurons,
    "features_per_layer": lambda one: one.estimate,
    "load": lambda one: one.load,
    "l0": lambda one: one.l0,
}


def _filled(table: Float[np.ndarray, "n l"]) -> Float[np.ndarray, "n l"]:
    """NaN replaced by row times column, of the product that is nearest to the known numbers."""
    known = ~np.isnan(table)
    values = np.where(known, table, 0.0)
    if known.all():
        return values
    rows = np.ones(len(table))
    for _ in range(ROUNDS):
        columns = values.sum(0) / (known * rows[:, None]).sum(0)
        expected = (known * columns).sum(1)
        rows = np.divide(values.sum(1), expected, out=np.ones(len(table)), where=expected > 0)
    filled: Float[np.ndarray, "n l"] = np.where(known, table, rows[:, None] * columns)
    return filled


def _reasons(
    shape_label: str,
    own: dict[tuple[int, int], LayerObservation],
    counted: np.ndarray,
    numbers: Sequence[int],
    kept: Sequence[int],
    rules: Rules,
) -> list[str]:
    if not own:
        return [f"{shape_label} was not counted."]
    reasons = []
    if counted.mean() < rules.least_counted:
        coverage = min(one.coverage for one in own.values())
        reasons.append(
            f"{shape_label}: {int(counted.sum())} of {counted.size} layers could be counted "
            f"({rules.least_counted:.0%} are needed); the least coverage is {coverage:.2f}, where "
            f"{rules.least_coverage} is needed."
        )
    if len(kept) < rules.least_replicates:
        reasons.append(
            f"{shape_label}: {len(kept)} models with half of their layers counted, of "
            f"{rules.least_replicates} that are needed."
        )
        return reasons
    shares = counted[list(kept)].mean(0)
    seldom = [layer for layer, share in zip(numbers, shares, strict=True) if share < 0.5]
    if seldom:
        reasons.append(
            f"{shape_label}: layer {seldom[0]} could be counted in less than half of the models."
        )
    return reasons
