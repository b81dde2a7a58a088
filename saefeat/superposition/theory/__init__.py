"""Sizes and limits: what a shape holds, what a loss costs, what sparsity lets a layer hold.

Katta 2024 (arXiv:2407.01459) puts three facts together. Loss depends on the number of parameters
and hardly on their shape (`scaling_laws`); features live on the neurons of a layer (`shapes`);
and compressed sensing bounds the features per neuron by how rarely features are on (`capacity`).
A wider model of equal size has fewer neurons for the same features, so its features would have to
be rarer, though how often they are on is a fact about the data.

Letters: N parameters, L layers of width d; F features of the whole model, n of a layer; m neurons
of a layer; p the density of a feature, P(active), which is the 1 - S of Elhage et al. 2022
(arXiv:2209.10652); psi features per neuron, the degree of superposition.
"""

from saefeat.superposition.theory.capacity import (
    GAUSSIAN_L1_CONSTANT,
    load,
    max_degree,
    max_degree_with_square_term,
    max_density,
)
from saefeat.superposition.theory.scaling_laws import (
    LOSS_FROM_COMPUTE,
    LOSS_FROM_PARAMETERS,
    LOSS_FROM_PARAMETERS_AND_TOKENS,
    LOSS_FROM_TOKENS,
    FittedLaw,
    JointLaw,
    PowerLaw,
)
from saefeat.superposition.theory.shapes import (
    DEGREE_SLOPES,
    WIDENING_EXPONENTS,
    Shape,
    shape_ratios,
    widening_ratios,
)

__all__ = [
    "DEGREE_SLOPES",
    "GAUSSIAN_L1_CONSTANT",
    "LOSS_FROM_COMPUTE",
    "LOSS_FROM_PARAMETERS",
    "LOSS_FROM_PARAMETERS_AND_TOKENS",
    "LOSS_FROM_TOKENS",
    "WIDENING_EXPONENTS",
    "FittedLaw",
    "JointLaw",
    "PowerLaw",
    "Shape",
    "load",
    "max_degree",
    "max_degree_with_square_term",
    "max_density",
    "shape_ratios",
    "widening_ratios",
]
