"""The answer of `count_features`."""

from dataclasses import asdict, dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from saefeat.core.html import table
from saefeat.superposition.counting.agreement import Agreement
from saefeat.superposition.sae_counts import SAECounts


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One comparison of random starts on the way to the count."""

    stage: str
    """"width" while width and picks are chosen, "half" and "whole" at the end."""
    d_sae: int
    picks: int
    """Atoms that a row may pick."""
    n_tokens: int
    """Rows that each dictionary was fitted on."""
    n_features: int
    """Features that two random starts at least have found."""
    n_strict: int
    """Those that all have found, at a cosine of 0.95."""
    n_combined: int
    """Directions that were left out as combinations of others."""
    shared_energy: float
    """Share of the energy of the codes that is in what two starts at least have found."""
    coverage: float
    chao2: float
    """Features with those that no start has found, as far as they can be told."""
    fvu: float

    @classmethod
    def of(cls, stage: str, one: Agreement) -> "Step":
        """What `one` comes to."""
        return cls(
            stage=stage,
            d_sae=one.d_sae,
            picks=one.picks,
            n_tokens=one.n_rows,
            n_features=one.n_features,
            n_strict=one.n_strict,
            n_combined=one.n_combined,
            shared_energy=one.shared_energy,
            coverage=one.coverage,
            chao2=one.chao2,
            fvu=one.fvu,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureCount:
    """How many features a layer holds, and how far that can be known. `print` it.

    Where `identifiable` is False, no number of features can be told: `estimate` is `low`, which is
    what was found at least, and `high` is infinite.
    """

    hook_name: str
    n_neurons: int
    """Coordinates of the activations."""
    estimate: float
    low: float
    high: float
    """Interval that holds the number of features in 95 % of layers like those of the benchmark."""
    coverage: float
    """Share of what one random start finds that the others have found too (Good-Turing)."""
    identifiable: bool
    """Whether the features can be told apart at this load, with so many rows."""
    reasons: tuple[str, ...]
    """Why not, or what widened the interval."""
    load: float
    """Sum over the features of p ln(1/p), per neuron; recovery by l1 needs about 2 load < 1."""
    n_tokens: int
    """Rows that the last dictionaries were fitted on."""
    seeds: tuple[int, ...]
    steps: tuple[Step, ...]
    """All comparisons of random starts, in their order."""
    directions: Float[Tensor, "n_features d_in"] = field(repr=False)
    """The features that were found."""
    densities: Float[Tensor, " n_features"] = field(repr=False)
    """Share of the rows in which each is on, with a third of its usual strength at least."""
    saes: tuple[SAECounts, ...] = ()
    """What SAEs of several widths count on the same rows."""

    @property
    def per_neuron(self) -> float:
        """Features per neuron: the degree of superposition."""
        return self.estimate / self.n_neurons

    @property
    def last_step(self) -> Step:
        """The comparison that the count rests on: the last, or, where starts agreed on too little
        for a longer one, that of the width at which they agree on most."""
        last = self.steps[-1]
        if last.stage == "whole":
            return last
        return max(self.width_curve, key=lambda step: step.n_strict)

    @property
    def width_curve(self) -> tuple[Step, ...]:
        """The best number of picks at each width that was tried."""
        best: dict[int, Step] = {}
        for step in self.steps:
            kept = best.get(step.d_sae)
            if step.stage == "width" and (kept is None or step.shared_energy > kept.shared_energy):
                best[step.d_sae] = step
        return tuple(best.values())

    def summary(self) -> dict[str, Any]:
        """All but the tensors, for JSON."""
        names = ("hook_name", "n_neurons", "estimate", "low", "high", "per_neuron", "coverage")
        more = ("identifiable", "reasons", "load", "n_tokens", "seeds")
        facts = {name: getattr(self, name) for name in (*names, *more)}
        facts["high"] = self.high if self.identifiable else None
        facts["steps"] = [asdict(step) for step in self.steps]
        facts["saes"] = [asdict(counts) for counts in self.saes]
        return facts

    def _repr_html_(self) -> str:
        first, *notes = str(self).splitlines()
        columns = ("stage", "atoms", "picks", "rows", "features", "energy found again", "coverage")
        rows = [
            (
                step.stage,
                f"{step.d_sae:,}",
                step.picks,
                f"{step.n_tokens:,}",
                f"{step.n_features:,}",
                f"{step.shared_energy:.1%}",
                f"{step.coverage:.3f}",
            )
            for step in self.steps
        ]
        return table(first, columns, rows, notes)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        if self.identifiable:
            number = (
                f"{self.estimate:,.0f} features (95 %: {self.low:,.0f} to {self.high:,.0f}), "
                f"{self.per_neuron:.2f} per neuron"
            )
        else:
            number = (
                f"beyond the detection limit, at least {self.low:,.0f} features "
                f"({self.low / self.n_neurons:.2f} per neuron)"
            )
        lines = [f"{self.hook_name}: {number}"]
        last = self.last_step
        lines.append(
            f"  {last.d_sae:,} atoms, {last.picks} picks a row, {self.n_tokens:,} rows, "
            f"{len(self.seeds)} random starts: coverage {self.coverage:.3f}, "
            f"{last.shared_energy:.1%} of the energy found again, 2 x load {2 * self.load:.2f}"
        )
        lines += [f"  {reason}" for reason in self.reasons]
        for sae in self.saes:
            alive = sum(sae.alive.per_seed) / len(sae.seeds)
            effective = sum(sae.effective) / len(sae.seeds)
            lines.append(
                f"  BatchTopK SAEs of {sae.d_sae:,} latents: {alive:,.0f} alive, e^H "
                f"{effective:,.0f}, in two seeds {sae.alive.n_stable:,}, by ablation "
                f"{sae.distinct.n_stable:,}, Chao2 {sae.distinct.chao2:,.0f}"
            )
        return "\n".join(lines)
