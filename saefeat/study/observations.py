"""What the equal-parameter study observed: plain records, which go through JSON and back.

The pipeline fills them, `findings` reads them, and nothing else is in between, so that numbers can
be looked at again without training anything again. A piece that was not measured is left out, or
None where a field says so.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saefeat.core.records import from_json
from saefeat.study.checks import (
    check_above_zero,
    check_among,
    check_distinct,
    check_finite,
)
from saefeat.study.density_histogram import DensityHistogram
from saefeat.superposition.calibration.calibrated_count import why_untrusted
from saefeat.superposition.counting.feature_count import FeatureCount
from saefeat.superposition.sae_counts import SAECounts
from saefeat.superposition.theory import load
from saefeat.superposition.universality.result import Universality
from saefeat.superposition.universality.score import Score

CONTROLS = ("trained", "random")
"""Models as trained, and as they were initialised: what a random transformer gives is no finding
about learning (Heap et al. 2025, arXiv:2501.17727)."""
SITES = ("mlp", "residual")
"""Hidden neurons of the MLP, and the residual stream."""
INSTRUMENTS = ("matching_pursuit", "batch_topk", "frozen_decoder")
"""What counted: `count_features`, BatchTopK SAEs, or SAEs whose decoder stays as it was drawn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObservedShape:
    """One of the shapes that are compared at an equal number of parameters."""

    label: str
    n_layers: int
    d_model: int
    n_parameters: int
    """Without embeddings and unembedding."""

    def __post_init__(self) -> None:
        check_above_zero(self, "n_layers", "d_model", "n_parameters")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerObservation:
    """The count of one layer of one model, by one instrument."""

    shape_label: str
    model_seed: int
    """The replicate: models of one shape differ in it alone."""
    control: str
    """One of `CONTROLS`."""
    site: str
    """One of `SITES`."""
    layer: int
    hook_name: str
    instrument: str
    """One of `INSTRUMENTS`."""
    n_neurons: int
    """Coordinates of the activations."""
    estimate: float
    """Features; `low` where they could not be counted."""
    low: float
    high: float | None
    """Ends of the 95 % interval; None where there is no upper one."""
    identifiable: bool
    """Whether the instrument says that it could count them."""
    coverage: float
    """Share of what one random start found that the others found too (Good-Turing)."""
    load: float
    """Sum of p ln(1/p) over the features that were found, per neuron."""
    l0: float
    """Mean features on for a token: the sum of their densities."""
    fvu: float
    """What the last dictionaries left unexplained."""
    densities: DensityHistogram
    n_tokens: int
    """Rows that the last dictionaries were fitted on."""
    reasons: tuple[str, ...] = ()
    """Why the features could not be counted, or what widened the interval."""

    def __post_init__(self) -> None:
        check_among(self, control=CONTROLS, site=SITES, instrument=INSTRUMENTS)
        check_above_zero(self, "n_neurons", "n_tokens")
        check_finite(self, "estimate", "low", "coverage", "load", "l0", "fvu")
        high = math.inf if self.high is None else self.high
        if not 0 <= self.low <= self.estimate <= high:
            raise ValueError(
                f"A count lies in its interval: {self.hook_name} of {self.shape_label}, seed "
                f"{self.model_seed}, has {self.estimate} and {self.low} to {self.high}."
            )

    @property
    def place(self) -> tuple[str, int, str, str, str, int]:
        """What no two observations share."""
        who = (self.shape_label, self.model_seed, self.control)
        return (*who, self.site, self.instrument, self.layer)

    @classmethod
    def of_count(
        cls,
        count: FeatureCount,
        *,
        shape_label: str,
        model_seed: int,
        site: str,
        layer: int,
        control: str = "trained",
    ) -> "LayerObservation":
        """What `count_features` said of a layer."""
        return cls(
            shape_label=shape_label,
            model_seed=model_seed,
            control=control,
            site=site,
            layer=layer,
            hook_name=count.hook_name,
            instrument="matching_pursuit",
            n_neurons=count.n_neurons,
            estimate=count.estimate,
            low=count.low,
            high=count.high if math.isfinite(count.high) else None,
            identifiable=count.identifiable,
            coverage=count.coverage,
            load=count.load,
            l0=float(count.densities.sum()),
            fvu=count.last_step.fvu,
            densities=DensityHistogram.of(count.densities),
            n_tokens=count.n_tokens,
            reasons=count.reasons,
        )

    @classmethod
    def of_sae_counts(
        cls,
        counts: SAECounts,
        *,
        n_tokens: int,
        shape_label: str,
        model_seed: int,
        site: str,
        layer: int,
        control: str = "trained",
        instrument: str = "batch_topk",
    ) -> "LayerObservation":
        """What `sae_counts` said of a layer, by the latents that cost something, copies merged.

        The estimate is what two seeds share, the low end too, and the high end is that of Chao2:
        they miss more the fuller the layer is (`calibrate`). Load and L0 are means over seeds; the
        histogram holds the latents of all seeds.

        Args:
            counts: Of one hook and width.
            n_tokens: Rows that the SAEs were trained on; those of `counts` were held out.
            shape_label: As in the record, and so are the others.
        """
        distinct, n_seeds = counts.distinct, len(counts.seeds)
        reasons = tuple(why_untrusted(counts))
        densities = torch.tensor(counts.densities, dtype=torch.float64)
        return cls(
            shape_label=shape_label,
            model_seed=model_seed,
            control=control,
            site=site,
            layer=layer,
            hook_name=counts.hook_name,
            instrument=instrument,
            n_neurons=counts.d_in,
            estimate=float(distinct.n_stable),
            low=float(distinct.n_stable),
            high=None if reasons else distinct.chao2_high,
            identifiable=not reasons,
            coverage=distinct.coverage or 0.0,
            load=load(densities, counts.d_in) / n_seeds,
            l0=float(densities.sum()) / n_seeds,
            fvu=sum(counts.fvu) / n_seeds,
            densities=DensityHistogram.of(densities),
            n_tokens=n_tokens,
            reasons=reasons,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelObservation:
    """One model."""

    shape_label: str
    model_seed: int
    control: str
    validation_loss: float
    """Nats per byte, on the same held-out text for all."""
    n_bytes: int
    """That it was trained on; 0 for a random one."""

    def __post_init__(self) -> None:
        check_among(self, control=CONTROLS)
        check_finite(self, "validation_loss")
        check_above_zero(self, "validation_loss")


@dataclass(frozen=True, kw_only=True, slots=True)
class JointObservation:
    """All layers of one model together."""

    shape_label: str
    model_seed: int
    control: str
    site: str
    reuse: float | None = None
    """pi: layers that hold a latent of a crosscoder, on average, 1 to L; None if not measured."""
    n_features: float | None = None
    """Features of the whole model, each counted once; None if not measured, or not countable."""
    low: float | None = None
    """What they are at least, and"""
    high: float | None = None
    """at most, with 95 % confidence; None where there is no such end."""

    def __post_init__(self) -> None:
        check_among(self, control=CONTROLS, site=SITES)
        if self.reuse is not None and not 1 <= self.reuse < math.inf:
            raise ValueError(
                f"A latent is held by one layer at least, got a reuse of {self.reuse}."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class PairObservation:
    """Features of two models of different shapes, matched one to one by what they fire on.

    Several pairs of layers of the same two models are averaged. Pairs of models have no model in
    common, so that they are independent.
    """

    narrow_label: str
    narrow_seed: int
    wide_label: str
    wide_seed: int
    site: str
    instrument: str
    hook_names: tuple[str, str]
    n_matched: int
    """Pairs with a correlation of `least_correlation` at least."""
    least_correlation: float
    log2_density_ratio: float | None
    """Mean over these pairs of log2(density in the wide model / density in the narrow one)."""
    standard_error: float | None
    """Of that mean, over the pairs; None where there are fewer than 2."""
    scores: tuple[Score, ...]
    """U and its parts against each null."""

    def __post_init__(self) -> None:
        check_among(self, site=SITES, instrument=INSTRUMENTS)

    @classmethod
    def of_universality(
        cls,
        result: Universality,
        narrow_densities: Float[Tensor, " w"],
        wide_densities: Float[Tensor, " v"],
        *,
        narrow: tuple[str, int],
        wide: tuple[str, int],
        site: str,
        instrument: str,
        least_correlation: float = 0.5,
    ) -> "PairObservation":
        """What `universality(narrow, wide)` said.

        Args:
            result: Of the dictionary of the narrow model as A and that of the wide one as B.
            narrow_densities: Of all latents of A, on the tokens that both read.
            wide_densities: Of those of B.
            narrow: Label of the shape, and model seed.
            wide: The same of the other.
            site: Where the dictionaries read.
            instrument: What they are.
            least_correlation: Pairs below are no match.
        """
        kept = result.correlations >= least_correlation
        density = narrow_densities[result.rows[kept]].double()
        other = wide_densities[result.columns[kept]].double()
        ratios = (other / density).log2()
        n = len(ratios)
        return cls(
            narrow_label=narrow[0],
            narrow_seed=narrow[1],
            wide_label=wide[0],
            wide_seed=wide[1],
            site=site,
            instrument=instrument,
            hook_names=result.names,
            n_matched=n,
            least_correlation=least_correlation,
            log2_density_ratio=float(ratios.mean()) if n else None,
            standard_error=float(ratios.std() / n**0.5) if n > 1 else None,
            scores=result.scores,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Observations:
    """All that a study observed.

    Raises:
        ValueError: A record is of a shape that is not listed, or two are of the same thing.
    """

    shapes: tuple[ObservedShape, ...]
    pair: tuple[str, str]
    """Labels of the narrow shape, A, and the wide one, B, of which the table and the test are."""
    layers: tuple[LayerObservation, ...]
    models: tuple[ModelObservation, ...] = ()
    joint: tuple[JointObservation, ...] = ()
    pairs: tuple[PairObservation, ...] = ()
    protocol: dict[str, Any] = field(default_factory=dict)
    """The configuration that was recorded before anything was measured."""

    def __post_init__(self) -> None:
        labels = [one.label for one in self.shapes]
        used = {one.shape_label for one in self.layers}
        used |= {one.shape_label for one in self.models}
        used |= {one.shape_label for one in self.joint}
        used |= {label for one in self.pairs for label in (one.narrow_label, one.wide_label)}
        unknown = sorted((used | set(self.pair)) - set(labels))
        if unknown or len(set(labels)) < len(labels):
            raise ValueError(f"Each shape is listed once; got {labels}, and records of {unknown}.")
        if self.shape(self.pair[0]).d_model >= self.shape(self.pair[1]).d_model:
            raise ValueError(f"The pair is a narrow shape and a wider one, got {self.pair}.")
        for records in (
            [one.place for one in self.layers],
            [(one.shape_label, one.model_seed, one.control) for one in self.models],
            [(one.shape_label, one.model_seed, one.control, one.site) for one in self.joint],
        ):
            check_distinct(records)

    def shape(self, label: str) -> ObservedShape:
        """The shape of that label."""
        return next(one for one in self.shapes if one.label == label)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> "Observations":
        """What `to_dict` gave, through JSON or not.

        Raises:
            ValueError: A field is missing, unknown, or out of range.
        """
        return from_json(cls, facts, "A record of observations")
