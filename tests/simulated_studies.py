"""Studies whose truth is known: counts drawn by an error model, under one of the three theories.

The error of a count is as in benchmarks/results/counting.csv: none in most layers and up to 2 %,
one in twenty flagged, intervals of 2 to 8 %.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from saefeat.study import DensityHistogram, LayerObservation, ModelObservation, Observations
from saefeat.study.observations import ObservedShape
from saefeat.superposition.theory import DEGREE_SLOPES

SHAPES = {
    label: ObservedShape(
        label=label, n_layers=n_layers, d_model=d_model, n_parameters=12 * n_layers * d_model**2
    )
    for label, n_layers, d_model in (
        ("deep", 16, 34),
        ("A", 8, 48),
        ("flat", 4, 68),
        ("B", 2, 96),
    )
}
DENSITIES = DensityHistogram.of(0.01 * 3 ** torch.special.ndtri(torch.linspace(0.001, 0.999, 500)))
"""Of every layer: log-normal."""


def simulated_study(
    slope: float | str,
    *,
    seed: int = 0,
    labels: Sequence[str] = ("A", "B"),
    n_seeds: int = 4,
    spread: float = 0.05,
    count_error: float = 0.005,
    shape_error: float = 0.0,
    failing: float = 0.05,
    degree: float = 3.0,
    density: float = 0.01,
    control_slope: float | str | None = None,
    wide_loss: float = 1.35,
) -> Observations:
    """What a study would see.

    Args:
        slope: beta, or the name of a theory.
        seed: Of the draws.
        labels: Shapes, of which A and B are the pair.
        n_seeds: Models of each.
        spread: Standard deviation of ln psi between models of one shape.
        count_error: Standard deviation of ln of a count about what the layer holds.
        shape_error: Standard deviation of what ln of all counts of a shape is off by together.
        failing: Share of the layers that cannot be counted.
        degree: Features per neuron at a width of 48.
        density: Of every feature.
        control_slope: The same of random models, which hold a tenth; None for no random models.
        wide_loss: Validation loss of B; that of the others is 1.35.
    """
    generator = np.random.default_rng(seed)
    layers: list[LayerObservation] = []
    models: list[ModelObservation] = []
    kinds = [("trained", slope, degree)]
    if control_slope is not None:
        kinds.append(("random", control_slope, degree / 10))
    for control, beta, at_48 in kinds:
        beta = DEGREE_SLOPES[beta] if isinstance(beta, str) else beta
        for label in labels:
            shape = SHAPES[label]
            together = shape_error * generator.standard_normal() if shape_error else 0.0
            # Layers of a model are unequal, alike in all models of the shape.
            profile = 0.2 * np.cos(np.arange(shape.n_layers))
            profile -= np.log(np.exp(profile).mean())
            for model_seed in range(n_seeds):
                own = spread * generator.standard_normal()
                log_degree = np.log(at_48) + beta * np.log(shape.d_model / 48) + own + profile
                errors = together + count_error * generator.standard_normal(shape.n_layers)
                fails = generator.random(shape.n_layers) < failing
                loss = wide_loss if label == "B" else 1.35
                models.append(
                    ModelObservation(
                        shape_label=label,
                        model_seed=model_seed,
                        control=control,
                        validation_loss=loss if control == "trained" else 5.5,
                        n_bytes=7_000_000 if control == "trained" else 0,
                    )
                )
                for layer in range(shape.n_layers):
                    n_neurons = 4 * shape.d_model
                    estimate = float(n_neurons * np.exp(log_degree[layer] + errors[layer]))
                    layers.append(
                        LayerObservation(
                            shape_label=label,
                            model_seed=model_seed,
                            control=control,
                            site="mlp",
                            layer=layer,
                            hook_name=f"blocks.{layer}.mlp.hook_post",
                            instrument="matching_pursuit",
                            n_neurons=n_neurons,
                            estimate=estimate,
                            low=0.96 * estimate,
                            high=1.03 * estimate,
                            identifiable=True,
                            coverage=0.99,
                            load=float(-estimate * density * np.log(density) / n_neurons),
                            l0=estimate * density,
                            fvu=0.1,
                            densities=DENSITIES,
                            n_tokens=1_000_000,
                        )
                    )
                    if fails[layer]:
                        layers[-1] = failed(layers[-1])
    return Observations(
        shapes=tuple(SHAPES[label] for label in labels),
        pair=("A", "B"),
        layers=tuple(layers),
        models=tuple(models),
    )


def failed(layer: LayerObservation, at_least: float = 0.4) -> LayerObservation:
    """The layer as it is where its features cannot be counted."""
    low = at_least * layer.estimate
    return replace(layer, estimate=low, low=low, high=None, identifiable=False, coverage=0.7)
