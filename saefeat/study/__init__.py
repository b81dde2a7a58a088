"""The equal-parameter study: do models of one size and unequal shapes divide their features?

`observations` is what was seen, `replicates` makes one number a model of it, `statistics` has the
tests, `verdict` the judgement by `rules`, and `analysis` puts them together.
"""

from saefeat.study.analysis import findings
from saefeat.study.density_histogram import DensityHistogram
from saefeat.study.finding import Finding, Findings
from saefeat.study.observations import (
    JointObservation,
    LayerObservation,
    ModelObservation,
    Observations,
    ObservedShape,
    PairObservation,
)
from saefeat.study.rules import Rules
from saefeat.study.verdict import Evidence, Verdict, judge

__all__ = [
    "DensityHistogram",
    "Evidence",
    "Finding",
    "Findings",
    "JointObservation",
    "LayerObservation",
    "ModelObservation",
    "Observations",
    "ObservedShape",
    "PairObservation",
    "Rules",
    "Verdict",
    "findings",
    "judge",
]
