"""What is wrong with a dictionary's latents, measured: one diagnostic a file."""

from saefeat.superposition.diagnostics.absorption import (
    Absorption,
    absorption_by_narrower,
    absorption_of_feature,
)
from saefeat.superposition.diagnostics.activation_bands import LowActivations, low_activations
from saefeat.superposition.diagnostics.co_activation import CoActivation
from saefeat.superposition.diagnostics.composition import (
    Classified,
    Compositions,
    classify,
    compositions,
)
from saefeat.superposition.diagnostics.hierarchy import Hierarchy, child_parent_pairs
from saefeat.superposition.diagnostics.splitting import Splits, cluster_sizes, splits

__all__ = [
    "Absorption",
    "Classified",
    "CoActivation",
    "Compositions",
    "Hierarchy",
    "LowActivations",
    "Splits",
    "absorption_by_narrower",
    "absorption_of_feature",
    "child_parent_pairs",
    "classify",
    "cluster_sizes",
    "compositions",
    "low_activations",
    "splits",
]
