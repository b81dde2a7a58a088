"""The equal-parameter study: do models of one size and unequal shapes divide their features?

`run` is the whole of it, by a `protocol` that is written down first: `subjects` are the models,
`observe` and `pairs` look at them. `observations` is what was seen, `replicates` makes one number a
model of it, `statistics` has the tests, `verdict` the judgement by `rules`, `analysis` puts them
together, and `figures` draws them.
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
from saefeat.study.protocol import PRESETS, Protocol
from saefeat.study.rules import Rules
from saefeat.study.run import run_study
from saefeat.study.verdict import Evidence, Verdict, judge

__all__ = [
    "PRESETS",
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
    "Protocol",
    "Rules",
    "Verdict",
    "findings",
    "judge",
    "run_study",
]
