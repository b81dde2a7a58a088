"""The pictures of a study, from its records alone.

A `Finding` gives one panel, `Findings` one for each site and instrument.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from saefeat.report.study_plots import (
    CountedLayer,
    LayerPanel,
    ShapePoints,
    SlopePanel,
    layer_panels,
    slope_panels,
)
from saefeat.study.density_histogram import summed
from saefeat.study.finding import Finding, Findings
from saefeat.study.observations import LayerObservation, Observations, ObservedShape
from saefeat.study.replicates import is_counted
from saefeat.study.rules import Rules

if TYPE_CHECKING:
    from saefeat.report.study_plots import Figure


def slope_figure(found: Finding | Findings, observations: Observations) -> "Figure":
    """ln psi against ln d: every model, the fit with its interval, and the theories' slopes.

    A model that could not be counted is drawn at its lower bound, the mean over its layers.

    Args:
        found: What followed from the observations.
        observations: The same that it followed from.
    """
    return slope_panels([_slope_panel(part, observations) for part in _parts(found)])


def layer_figure(found: Finding | Findings, observations: Observations, rules: Rules) -> "Figure":
    """Every layer of every trained model, the shapes side by side, with density histograms.

    Args:
        found: What followed from the observations.
        observations: The same that it followed from.
        rules: That say which layers could be counted; the others are drawn as lower bounds.
    """
    shapes = _by_width(observations)
    return layer_panels(
        {
            _title(part): [
                _layer_panel(shape, _layers(part, observations, shape), rules) for shape in shapes
            ]
            for part in _parts(found)
        }
    )


def _slope_panel(part: Finding, observations: Observations) -> SlopePanel:
    shapes = []
    for shape in _by_width(observations):
        counted = [one for one in part.replicates if one.shape_label == shape.label]
        seeds = {one.model_seed for one in counted}
        lows: dict[int, list[float]] = {}
        for one in _layers(part, observations, shape):
            if one.model_seed not in seeds:
                lows.setdefault(one.model_seed, []).append(one.low / one.n_neurons)
        shapes.append(
            ShapePoints(
                label=shape.label,
                width=shape.d_model,
                degrees=[one.features_per_neuron for one in counted],
                at_least=[float(np.mean(own)) for own in lows.values()],
                untrained=[
                    one.features_per_neuron
                    for one in part.controls
                    if one.shape_label == shape.label
                ],
            )
        )
    beta = part.slope
    return SlopePanel(
        title=_title(part),
        shapes=shapes,
        slope=None if beta is None else (beta.value, beta.low, beta.high),
        theories=part.verdict.predicted,
    )


def _layer_panel(
    shape: ObservedShape, layers: Sequence[LayerObservation], rules: Rules
) -> LayerPanel:
    numbers = sorted({one.layer for one in layers})
    histograms = {
        number: summed([one.densities for one in layers if one.layer == number])
        for number in numbers
    }
    return LayerPanel(
        title=f"{shape.label}: {shape.n_layers} layers, width {shape.d_model}",
        layers=[
            CountedLayer(
                layer=one.layer,
                degree=one.estimate / one.n_neurons,
                low=one.low / one.n_neurons,
                high=one.high / one.n_neurons
                if one.high is not None and is_counted(one, rules)
                else None,
            )
            for one in layers
        ],
        histograms={number: (one.edges, one.counts) for number, one in histograms.items()},
    )


def _layers(
    part: Finding, observations: Observations, shape: ObservedShape
) -> list[LayerObservation]:
    """Of trained models, in the order of the models."""
    own = (part.site, part.instrument, "trained", shape.label)
    return sorted(
        (
            one
            for one in observations.layers
            if (one.site, one.instrument, one.control, one.shape_label) == own
        ),
        key=lambda one: one.model_seed,
    )


def _by_width(observations: Observations) -> list[ObservedShape]:
    return sorted(observations.shapes, key=lambda shape: shape.d_model)


def _parts(found: Finding | Findings) -> tuple[Finding, ...]:
    return found.parts if isinstance(found, Findings) else (found,)


def _title(part: Finding) -> str:
    return f"{part.site}, by {part.instrument.replace('_', ' ')}: {part.verdict.conclusion}"
