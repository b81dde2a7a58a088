"""The table of the narrow and the wide shape: what theories predict beside what was measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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


def comparison(
    narrow: ObservedShape,
    wide: ObservedShape,
    narrow_counts: ShapeCounts,
    wide_counts: ShapeCounts,
    whole_features: Sequence[np.ndarray | None],
    densities: Equivalence | None,
    universality: Estimate | None,
    reuse: Mapping[str, Estimate],
    rules: Rules,
) -> tuple[TableRow, ...]:
    """The table of Katta 2024 (arXiv:2407.01459), and what else tells the theories apart.

    With r the ratio of widths and beta the slope of a theory (`theory.DEGREE_SLOPES`), features per
    neuron go with r^beta, those of a layer with r^(beta + 1), their sum over layers with
    r^(beta - 1). At equal densities load goes with features per neuron, and L0 with those of a
    layer.
    """
    factor = wide.d_model / narrow.d_model

    def exact(name: str, of: Callable[[ObservedShape], float]) -> TableRow:
        a, b = float(of(narrow)), float(of(wide))
        power = WIDENING_EXPONENTS[name]
        point = Estimate(value=b / a, low=b / a, high=b / a)
        predicted: dict[str, float | None] = dict.fromkeys(DEGREE_SLOPES, factor**power)
        return TableRow(name=name, narrow=a, wide=b, predicted=predicted, measured=point)

    def counted(
        name: str, exponent: int, of: Callable[[Replicate], float], is_count: bool
    ) -> TableRow:
        sds = np.array([narrow_counts.count_sd, wide_counts.count_sd]) if is_count else None
        values = [one.values(of) for one in (narrow_counts, wide_counts)]
        return _row(name, values, _powers(factor, exponent), sds, rules)

    def only(name: str, measured: Estimate | None, ratios: float | None) -> TableRow:
        predicted: dict[str, float | None] = dict.fromkeys(DEGREE_SLOPES, ratios)
        return TableRow(name=name, narrow=None, wide=None, predicted=predicted, measured=measured)

    once: dict[str, float | None] = {"partitioned": 1.0, "filled": None, "shared": 1.0}
    density = None
    if densities is not None:
        e = densities.estimate
        density = Estimate(value=2**e.value, low=2**e.low, high=2**e.high)
    pi = [reuse[shape.label].value if shape.label in reuse else None for shape in (narrow, wide)]
    return (
        exact("parameters", lambda one: one.n_parameters),
        exact("neurons per layer", lambda one: one.d_model),
        exact("layers", lambda one: one.n_layers),
        exact("neurons", lambda one: one.d_model * one.n_layers),
        exact("aspect ratio", lambda one: one.d_model / one.n_layers),
        _row("features, each counted once", whole_features, once, None, rules),
        counted(
            "features, summed over layers",
            -1,
            lambda one: one.features_per_layer * one.n_layers,
            True,
        ),
        counted("features per layer", 1, lambda one: one.features_per_layer, True),
        counted("features per neuron", 0, lambda one: one.features_per_neuron, True),
        counted("2 x load", 0, lambda one: 2 * one.load, False),
        counted("L0 per layer", 1, lambda one: one.l0, False),
        only("density of matched features", density, 1.0),
        only("universality U", universality, 1.0),
        TableRow(
            name="layers that hold a latent",
            narrow=pi[0],
            wide=pi[1],
            predicted={
                "partitioned": 1.0,
                "filled": None,
                "shared": wide.n_layers / narrow.n_layers,
            },
            measured=None,
        ),
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
            if row.wide is not None and row.narrow:
                measured = _number(row.wide / row.narrow)
        elif row.measured.low == row.measured.high:
            measured = _number(row.measured.value)
        else:
            measured = str(row.measured)
        lines.append(
            f"{row.name:<29} {_number(row.narrow):>10} {_number(row.wide):>10} {predicted}  "
            f"{measured}"
        )
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
