"""The table of the narrow and the wide shape: what theories predict beside what was measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from saefeat.study.observations import ObservedShape
from saefeat.study.replicates import Replicate, ShapeCounts
from saefeat.study.rules import Rules
from saefeat.study.statistics import Equivalence, ratio
from saefeat.superposition.theory import DEGREE_SLOPES, WIDENING_EXPONENTS
from saefeat.superposition.universality.score import Estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class TableRow:
    """One quantity."""

    name: str
    narrow: float | None
    """Of A, mean over models; None where it was not measured."""
    wide: float | None
    """Of B."""
    predicted: dict[str, float | None]
    """B over A by each theory, at equal loss; None where it says nothing."""
    measured: Estimate | None
    """B over A; a point where it is a matter of the shapes."""
    are_bounds: tuple[bool, bool] = (False, False)
    """Whether `narrow` and `wide` are lower bounds, of models that could not be counted."""


def comparison(
    narrow: ObservedShape,
    wide: ObservedShape,
    narrow_counts: ShapeCounts,
    wide_counts: ShapeCounts,
    whole_features: Sequence[np.ndarray | None],
    densities: Equivalence | None,
    universality: Estimate | None,
    reuse: Sequence[np.ndarray],
    rules: Rules,
) -> tuple[TableRow, ...]:
    """The table of Katta 2024 (arXiv:2407.01459), and what else tells the theories apart.

    With r the ratio of widths and beta the slope of a theory (`theory.DEGREE_SLOPES`), features per
    neuron go with r^beta, those of a layer with r^(beta + 1), their sum over layers with
    r^(beta - 1). At equal densities load goes with features per neuron, and L0 with those of a
    layer.
    """
    factor = wide.d_model / narrow.d_model
    shapes, both = (narrow, wide), (narrow_counts, wide_counts)
    n_layers = {shape.label: shape.n_layers for shape in shapes}
    neurons = [one.n_neurons for one in both]
    all_neurons = [
        None if n is None else n * shape.n_layers for n, shape in zip(neurons, shapes, strict=True)
    ]

    def exact(name: str, a: float | None, b: float | None) -> TableRow:
        predicted: dict[str, float | None] = dict.fromkeys(
            DEGREE_SLOPES, factor ** WIDENING_EXPONENTS[name]
        )
        point = None
        if a is not None and b is not None:
            point = Estimate(value=b / a, low=b / a, high=b / a)
        return TableRow(name=name, narrow=a, wide=b, predicted=predicted, measured=point)

    def measured(name: str, exponent: int, of: Callable[[Replicate], float]) -> TableRow:
        values = [one.values(of) for one in both]
        return _row(name, values, _powers(factor, exponent), None, rules)

    def counted(
        name: str,
        exponent: int,
        of: Callable[[Replicate], float],
        per_neuron: Sequence[float | None],
    ) -> TableRow:
        """`per_neuron` is what a feature per neuron is worth: for lower bounds."""
        values = [one.values(of) for one in both]
        sds = np.array([one.count_sd for one in both])
        row = _row(name, values, _powers(factor, exponent), sds, rules)
        bounds = [
            None if each is None or one.replicates else one.at_least * each
            for one, each in zip(both, per_neuron, strict=True)
        ]
        return replace(
            row,
            narrow=row.narrow if bounds[0] is None else bounds[0],
            wide=row.wide if bounds[1] is None else bounds[1],
            are_bounds=(bounds[0] is not None, bounds[1] is not None),
        )

    def only(name: str, measured: Estimate | None, ratios: float | None) -> TableRow:
        predicted: dict[str, float | None] = dict.fromkeys(DEGREE_SLOPES, ratios)
        return TableRow(name=name, narrow=None, wide=None, predicted=predicted, measured=measured)

    once: dict[str, float | None] = {"partitioned": 1.0, "filled": None, "shared": 1.0}
    held = {"partitioned": 1.0, "filled": None, "shared": wide.n_layers / narrow.n_layers}
    density = None
    if densities is not None:
        e = densities.estimate
        density = Estimate(value=2**e.value, low=2**e.low, high=2**e.high)
    return (
        exact("parameters", *(float(one.n_parameters) for one in shapes)),
        exact("neurons per layer", *neurons),
        exact("layers", *(float(one.n_layers) for one in shapes)),
        exact("neurons", *all_neurons),
        exact("aspect ratio", *(one.d_model / one.n_layers for one in shapes)),
        _row("features, each counted once", whole_features, once, None, rules),
        counted(
            "features, summed over layers",
            -1,
            # Layers may have been counted that stand for all.
            lambda one: one.features_per_layer * n_layers[one.shape_label],
            all_neurons,
        ),
        counted("features per layer", 1, lambda one: one.features_per_layer, neurons),
        counted(
            "features per neuron",
            0,
            lambda one: one.features_per_neuron,
            [None if n is None else 1.0 for n in neurons],
        ),
        measured("2 x load", 0, lambda one: 2 * one.load),
        measured("L0 per layer", 1, lambda one: one.l0),
        only("density of matched features", density, 1.0),
        only("universality U", universality, 1.0),
        _row("layers that hold a latent", reuse, held, None, rules),
    )


def table_lines(rows: Sequence[TableRow]) -> list[str]:
    """The table as text."""
    theories = list(DEGREE_SLOPES)
    header = (
        f"{'':<29} {'A':>10} {'B':>10} "
        + " ".join(f"{name:>11}" for name in theories)
        + f"  {'measured B / A':<24}"
    ).rstrip()
    lines = [header, "-" * len(header)]
    for row in rows:
        predicted = " ".join(f"{_number(row.predicted[name]):>11}" for name in theories)
        if row.measured is None:
            measured = "not measured"
        elif row.measured.low == row.measured.high:
            measured = _number(row.measured.value)
        else:
            measured = str(row.measured)
        a, b = (
            "≥ " * is_bound + _number(value)
            for value, is_bound in zip((row.narrow, row.wide), row.are_bounds, strict=True)
        )
        lines.append(f"{row.name:<29} {a:>10} {b:>10} {predicted}  {measured}")
    return lines


def _powers(factor: float, exponent: int) -> dict[str, float | None]:
    return {name: factor ** (beta + exponent) for name, beta in DEGREE_SLOPES.items()}


def _row(
    name: str,
    values: Sequence[np.ndarray | None],
    predicted: dict[str, float | None],
    count_sds: np.ndarray | None,
    rules: Rules,
) -> TableRow:
    means = [None if one is None or not len(one) else float(one.mean()) for one in values]
    measured = None
    a, b = values
    if a is not None and b is not None and min(len(a), len(b)) >= 2 and min(*a, *b) > 0:
        measured = ratio(a, b, count_sds=count_sds, level=rules.level)
    return TableRow(
        name=name, narrow=means[0], wide=means[1], predicted=predicted, measured=measured
    )


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
