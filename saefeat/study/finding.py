"""The records of what a study found, and how they print."""

from dataclasses import asdict, dataclass
from typing import Any

from saefeat.study.replicates import Replicate
from saefeat.study.rules import Rules
from saefeat.study.statistics import Equivalence, Permutation
from saefeat.study.table import TableRow, table_lines
from saefeat.study.verdict import Verdict
from saefeat.superposition.universality.score import Estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One site, counted by one instrument. `print` it. None stands for what was not measured."""

    site: str
    instrument: str
    replicates: tuple[Replicate, ...]
    """Trained models that could be counted."""
    controls: tuple[Replicate, ...]
    """Random ones."""
    counted: dict[str, tuple[int, int]]
    """Layers of trained models that were counted, and all, by shape."""
    slope: Estimate | None
    """beta of ln psi on ln d."""
    bootstrap: Estimate | None
    """beta with the percentile bootstrap over models, which is too narrow for few."""
    lack_of_fit: float | None
    """p of the shapes lying on a line; None where there are two."""
    control_slope: Estimate | None
    permutation: Permutation | None
    """Of ln psi of A against B."""
    table: tuple[TableRow, ...]
    """A and B, quantity by quantity."""
    density_equivalence: Equivalence | None
    """Of log2 of the densities of matched features, B over A."""
    universality: Estimate | None
    """U over pairs of models, against the null that leaves least of it."""
    universality_null: str | None
    """That null."""
    reuse: dict[str, Estimate]
    """pi by shape, 1 to its layers."""
    saturated: bool | None
    """Whether 2 x load of A is above half the bound, so that doubling it passes the bound; None
    where its interval is on both sides."""
    verdict: Verdict

    def __str__(self) -> str:
        counted = ", ".join(f"{n} of {of} in {label}" for label, (n, of) in self.counted.items())
        lines = [f"{self.site}, by {self.instrument}: layers counted: {counted or 'none'}"]
        lines += table_lines(self.table)
        if self.slope is not None and self.bootstrap is not None:
            lines.append(
                f"slope of ln psi on ln d: {self.slope} by Welch's t, "
                f"{self.bootstrap.low:.3f} to {self.bootstrap.high:.3f} by percentile bootstrap"
            )
        for name, one in (("random models", self.control_slope), ("U", self.universality)):
            said = "not measured" if one is None else f"{one}"
            null = f" (null: {self.universality_null})" if name == "U" and one is not None else ""
            lines.append(f"{name}: {said}{null}")
        if self.permutation is not None:
            lines.append(
                f"A against B by permutation: p = {self.permutation.p_value:.3g} (at the least "
                f"{self.permutation.least_p_value:.3g})"
            )
        if self.density_equivalence is not None:
            e = self.density_equivalence
            lines.append(
                f"log2 density ratio of matched features: {e.estimate}, "
                f"{'equal' if e.is_equivalent else 'not shown to be equal'} within {e.margin} "
                f"(p = {e.p_value:.2g})"
            )
        return "\n".join([*lines, str(self.verdict)])


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """What a study found. `print` it."""

    parts: tuple[Finding, ...]
    """One for each site and instrument that was observed."""
    losses: dict[str, Estimate]
    """Validation loss of the trained models, by shape; of those with 2 models at least. A token of
    the zoo is a byte."""
    loss_gap: float | None
    """Between the shapes' means, as a share of the smallest."""
    rules: Rules

    def __str__(self) -> str:
        losses = [f"loss of {label}: {loss} nats a token" for label, loss in self.losses.items()]
        if self.loss_gap is not None:
            losses.append(f"largest gap of their means: {self.loss_gap:.2%}")
        return "\n\n".join(["\n".join(losses), *(str(part) for part in self.parts)]).lstrip()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
