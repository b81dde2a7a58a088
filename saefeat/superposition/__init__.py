"""What the numbers mean: theory of superposition, its toy model, and counts of features."""

from saefeat.superposition.theory import (
    GAUSSIAN_L1_CONSTANT,
    LOSS_FROM_COMPUTE,
    LOSS_FROM_PARAMETERS,
    LOSS_FROM_PARAMETERS_AND_TOKENS,
    LOSS_FROM_TOKENS,
    Shape,
    load,
    max_degree,
    max_degree_with_square_term,
    max_density,
    shape_ratios,
    widening_ratios,
)
from saefeat.superposition.toy_model import (
    PLATEAUS,
    ToyModels,
    dimensions_per_feature,
    feature_dimensionality,
    features_per_dimension,
    n_represented,
    train_toy_models,
)

__all__ = [
    "GAUSSIAN_L1_CONSTANT",
    "LOSS_FROM_COMPUTE",
    "LOSS_FROM_PARAMETERS",
    "LOSS_FROM_PARAMETERS_AND_TOKENS",
    "LOSS_FROM_TOKENS",
    "PLATEAUS",
    "Shape",
    "ToyModels",
    "dimensions_per_feature",
    "feature_dimensionality",
    "features_per_dimension",
    "load",
    "max_degree",
    "max_degree_with_square_term",
    "max_density",
    "n_represented",
    "shape_ratios",
    "train_toy_models",
    "widening_ratios",
]
