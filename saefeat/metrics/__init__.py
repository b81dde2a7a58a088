"""Measures of dictionaries. One measure a file; each sums over batches and divides once."""

from saefeat.metrics.contribution import ablation_costs
from saefeat.metrics.fidelity import (
    fraction_variance_unexplained,
    normalized_mse,
)
from saefeat.metrics.layers import (
    decoder_cosines,
    effective_layers,
    feature_growth,
    features_held,
    layer_profile,
    peak_share,
    reuse,
)
from saefeat.metrics.loss_recovered import ce_loss_recovered
from saefeat.metrics.sparsity import (
    effective_features,
    feature_density,
    features_per_neuron,
    l0,
)
from saefeat.metrics.truth import (
    FeatureMatch,
    dead_fraction,
    l0_ratio,
    match_features,
    on_share_by_decile,
)

__all__ = [
    "FeatureMatch",
    "ablation_costs",
    "ce_loss_recovered",
    "dead_fraction",
    "decoder_cosines",
    "effective_features",
    "effective_layers",
    "feature_density",
    "feature_growth",
    "features_held",
    "features_per_neuron",
    "fraction_variance_unexplained",
    "l0",
    "l0_ratio",
    "layer_profile",
    "match_features",
    "normalized_mse",
    "on_share_by_decile",
    "peak_share",
    "reuse",
]
