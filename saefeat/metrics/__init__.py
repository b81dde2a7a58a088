"""Measures of dictionaries. One measure a file; each sums over batches and divides once."""

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

__all__ = [
    "ce_loss_recovered",
    "decoder_cosines",
    "effective_features",
    "effective_layers",
    "feature_density",
    "feature_growth",
    "features_held",
    "features_per_neuron",
    "fraction_variance_unexplained",
    "l0",
    "layer_profile",
    "normalized_mse",
    "peak_share",
    "reuse",
]
