"""What a transformer's shape holds, and what changes when it is widened at an equal size.

The picture of Katta 2024 (arXiv:2407.01459) is a cylinder, with the width d for a radius and the
number of layers L for a height: parameters go with its volume, L d^2, neurons with the surface of
its side, L d. Make it twice as wide at an equal volume, and it has a quarter of the height and
half of the side:

>>> import math
>>> def volume(radius, height):
...     return math.pi * radius**2 * height
>>> def side(radius, height):
...     return 2 * math.pi * radius * height
>>> narrow = Shape(n_layers=8, d_model=48)
>>> wide = narrow.widened(2)
>>> wide
Shape(n_layers=2.0, d_model=96)
>>> volume(wide.d_model, wide.n_layers) / volume(narrow.d_model, narrow.n_layers)
1.0
>>> side(wide.d_model, wide.n_layers) / side(narrow.d_model, narrow.n_layers)
0.5
>>> wide.n_parameters / narrow.n_parameters, wide.n_neurons / narrow.n_neurons
(1.0, 0.5)

Features on the surface are twice as crowded there. In the volume (the note's square term,
`capacity.max_degree_with_square_term`) they would have the same room in every shape.
"""

import math
from dataclasses import dataclass

from saefeat.superposition.theory.checks import check_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Layers and width of a transformer whose MLPs are four times as wide as its stream.

    Layers may be a fraction: the arithmetic of equal sizes does not mind.

    Raises:
        ValueError: A size is not a finite number above 0.
    """

    n_layers: float
    """L."""
    d_model: float
    """d, which is also the number of neurons that a layer is said to have; ratios are the same
    for the 4 d of an MLP."""

    def __post_init__(self) -> None:
        check_positive("A shape", n_layers=self.n_layers, d_model=self.d_model)

    @property
    def n_parameters(self) -> float:
        """N = 12 L d^2, without embeddings, biases and norms (Kaplan et al. 2020, eq. 2.1)."""
        return 12 * self.n_layers * self.d_model**2

    @property
    def n_neurons(self) -> float:
        """L d, in all layers."""
        return self.n_layers * self.d_model

    @property
    def aspect_ratio(self) -> float:
        """d / L."""
        return self.d_model / self.n_layers

    def features_per_layer(self, n_features: float) -> float:
        """F / L, where each of the model's features lives in one layer alone."""
        _check_features(n_features)
        return n_features / self.n_layers

    def degree(self, n_features: float) -> float:
        """Features per neuron, psi = F / (L d), which is 12 F d / N; the degree of superposition.

        Where each feature lives in one layer alone. `metrics.features_per_neuron` is the measured
        one of a layer.
        """
        _check_features(n_features)
        return n_features / self.n_neurons

    def widened(self, factor: float) -> "Shape":
        """The shape that is `factor` times as wide with as many parameters: L / r^2 by r d."""
        check_positive("Widening", factor=factor)
        return Shape(n_layers=self.n_layers / factor**2, d_model=self.d_model * factor)


WIDENING_EXPONENTS = {
    "parameters": 0,
    "neurons per layer": 1,
    "layers": -2,
    "neurons": -1,
    "features": 0,
    "features per layer": 2,
    "features per neuron": 1,
    "aspect ratio": 3,
}
"""The power of the width factor r that each quantity gains at equal N, by the premises of Katta
2024: equal loss, equal features, every feature in one layer."""

DEGREE_SLOPES = {"partitioned": 1, "filled": 0, "shared": -1}
"""Slope of ln(features per neuron) on ln(width) at equal N, by how features lie in layers.

Partitioned: each of F in one layer, psi = F / (L d), the premise of Katta 2024. Filled: every
layer holds what its width has room for, psi is constant. Shared: every layer holds all F, as a
residual stream could, psi = F / d.
"""


def widening_ratios(factor: float) -> dict[str, float]:
    """What widening by `factor` at equal N multiplies each quantity by: r to its exponent.

    >>> widening_ratios(2)["features per neuron"], widening_ratios(2)["layers"]
    (2.0, 0.25)
    """
    check_positive("Widening", factor=factor)
    return {name: float(factor) ** power for name, power in WIDENING_EXPONENTS.items()}


def shape_ratios(shape: Shape, other: Shape) -> dict[str, float]:
    """Each quantity of `other` over that of `shape`, if both hold the same features.

    For two shapes of equal N these are the `widening_ratios`; real pairs are only nearly so.
    Kaplan et al. 2020 (fig. 5) have one within 3 % of the loss of the other:

    >>> ratios = shape_ratios(Shape(n_layers=48, d_model=1600), Shape(n_layers=6, d_model=4288))
    >>> round(ratios["parameters"], 2), round(ratios["features per neuron"], 2)
    (0.9, 2.99)
    """
    return {
        "parameters": other.n_parameters / shape.n_parameters,
        "neurons per layer": other.d_model / shape.d_model,
        "layers": other.n_layers / shape.n_layers,
        "neurons": other.n_neurons / shape.n_neurons,
        "features": 1.0,
        "features per layer": other.features_per_layer(1) / shape.features_per_layer(1),
        "features per neuron": other.degree(1) / shape.degree(1),
        "aspect ratio": other.aspect_ratio / shape.aspect_ratio,
    }


def _check_features(n_features: float) -> None:
    if not 0 <= n_features < math.inf:
        raise ValueError(f"A model has 0 features or more, got n_features={n_features}.")
