"""What the figures of a study draw, from studies whose numbers are known."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from simulated_studies import failed, simulated_study

from saefeat.report.plots import png_bytes
from saefeat.report.study_plots import AT_LEAST, COUNTED, UNTRAINED
from saefeat.study import DensityHistogram, Observations, Rules, findings
from saefeat.study.figures import layer_figure, slope_figure

RULES = Rules(n_resamples=40)
STUDY = simulated_study("partitioned", failing=0, control_slope="filled")
PNG = b"\x89PNG"


def wide_fails(study: Observations) -> Observations:
    layers = [failed(one) if one.shape_label == "B" else one for one in study.layers]
    return replace(study, layers=tuple(layers))


def lines(axes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {one.get_label(): one.get_data() for one in axes.get_lines()}


def points(axes, label: str) -> np.ndarray:
    """All that is drawn under a label, [n, 2]."""
    groups = [one for one in axes.collections if one.get_label() == label]
    return np.concatenate([np.asarray(one.get_offsets()) for one in groups])


def bars(axes, label: str) -> list[np.ndarray]:
    """Of bars under a label: their points, [n, 2], and their ends, [n, 2]."""
    (found,) = [one for one in axes.containers if one.get_label() == label]
    ends = [segment[:, 1] for segment in found.lines[2][0].get_segments()]
    return [np.stack(found.lines[0].get_data(), 1), np.array(ends)]


def slope_of(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.diff(np.log(y))[0] / np.diff(np.log(x))[0])


# Slopes.


@pytest.mark.parametrize("theory", ["partitioned", "filled", "shared"])
def test_theories_and_fit_go_through_the_mean_point_with_their_slopes(theory) -> None:
    study = simulated_study(theory, failing=0)
    found = findings(study, RULES).parts[0]
    (axes,) = slope_figure(found, study).axes
    drawn = lines(axes)
    fit = next(label for label in drawn if label.startswith("fit"))
    assert fit == (
        f"fit: β = {found.slope.value:.2f} ({found.slope.low:.2f} to {found.slope.high:.2f})"
    )
    slopes = {"_partitioned": 1, "_filled": 0, "_shared": -1, fit: found.slope.value}
    assert {label: slope_of(*drawn[label]) for label in slopes} == pytest.approx(slopes, abs=1e-9)
    middle = np.mean([np.log(one.features_per_neuron) for one in found.replicates])
    for label in slopes:
        x, y = np.log(drawn[label])
        at_mean = np.interp(np.log([48, 96]).mean(), x, y)
        assert at_mean == pytest.approx(middle), label
    assert [text.get_text() for text in axes.texts] == [
        "partitioned: β = +1",
        "filled: β = 0",
        "shared: β = -1",
    ]
    (band,) = [one for one in axes.collections if isinstance(one, PolyCollection)]
    corners = band.get_paths()[0].vertices
    assert corners[:, 1].max() > drawn[fit][1].max()


def test_every_model_is_a_point_at_its_width() -> None:
    found = findings(STUDY, RULES).parts[0]
    (axes,) = slope_figure(found, STUDY).axes
    for label, width in (("A", 48), ("B", 96)):
        own = [one.features_per_neuron for one in found.replicates if one.shape_label == label]
        drawn = points(axes, f"_{label}")
        assert drawn[:, 1] == pytest.approx(own)
        assert drawn[:, 0] == pytest.approx([width] * 4, rel=0.03)
    random = [one.features_per_neuron for one in found.controls]
    assert sorted(points(axes, UNTRAINED)[:, 1]) == pytest.approx(sorted(random))
    assert [text.get_text() for text in axes.get_xticklabels()] == ["48\nA", "96\nB"]
    assert AT_LEAST not in [one.get_label() for one in axes.containers]


def test_a_shape_that_could_not_be_counted_is_arrows_and_there_is_no_fit() -> None:
    study = wide_fails(STUDY)
    (axes,) = slope_figure(findings(study, RULES), study).axes
    wide = [one for one in study.layers if one.shape_label == "B" and one.control == "trained"]
    lows = [
        np.mean([one.low / one.n_neurons for one in wide if one.model_seed == seed])
        for seed in range(4)
    ]
    starts, ends = bars(axes, AT_LEAST)
    assert starts[:, 1] == pytest.approx(lows)
    assert ends[:, 0] == pytest.approx(lows), "an arrow starts at the bound"
    assert (ends[:, 1] > lows).all(), "and goes up"
    drawn = lines(axes)
    assert not any(label.startswith("fit") for label in drawn)
    # The theories go through what is known of A: where they pass B the bounds can be compared.
    known = np.log(points(axes, "_A")[:, 1]).mean()
    x, y = np.log(drawn["_partitioned"])
    assert np.interp(np.log(48), x, y) == pytest.approx(known)


# Layers.


def test_every_layer_is_drawn_with_its_interval_beside_those_of_the_other_shape() -> None:
    figure = layer_figure(findings(STUDY, RULES), STUDY, RULES)
    upper = figure.axes[:2]
    assert [axes.get_title() for axes in upper] == [
        "A: 8 layers, width 48",
        "B: 2 layers, width 96",
    ]
    for axes, label in zip(upper, "AB", strict=True):
        own = [one for one in STUDY.layers if (one.shape_label, one.control) == (label, "trained")]
        places, ends = bars(axes, COUNTED)
        assert places[:, 1] == pytest.approx([one.estimate / one.n_neurons for one in own])
        assert places[:, 0].round().tolist() == [one.layer for one in own]
        assert ends == pytest.approx(
            np.array([(one.low / one.n_neurons, one.high / one.n_neurons) for one in own])
        )
        assert len(np.unique(places[:, 0])) == len(own), "none hides another"
    assert upper[0].get_ylim() == upper[1].get_ylim()


def test_a_layer_beyond_the_limit_is_an_arrow_from_its_lower_bound_and_no_point() -> None:
    layers = list(STUDY.layers)
    layers[3] = failed(layers[3])
    # Counted, but by a coverage at which the rules do not go by it.
    layers[5] = replace(layers[5], coverage=0.85)
    study = replace(STUDY, layers=tuple(layers))
    narrow = layer_figure(findings(study, RULES), study, RULES).axes[0]
    places, ends = bars(narrow, AT_LEAST)
    assert places[:, 0].round().tolist() == [3, 5]
    lows = [layers[i].low / layers[i].n_neurons for i in (3, 5)]
    assert places[:, 1] == pytest.approx(lows)
    assert (ends[:, 1] > lows).all()
    assert len(bars(narrow, COUNTED)[0]) == 4 * 8 - 2
    colours = {one.get_label(): one.lines[0].get_color() for one in narrow.containers}
    assert colours[AT_LEAST] != colours[COUNTED]


def test_below_each_layer_stands_the_histogram_of_its_densities() -> None:
    few = DensityHistogram(edges=(-3.0, -2.0, -1.0), counts=(3, 1), n_never=0)
    none = replace(few, counts=(0, 0), n_never=2)
    layers = [replace(one, densities=none if one.layer == 5 else few) for one in STUDY.layers]
    study = replace(STUDY, layers=tuple(layers))
    lower = layer_figure(findings(study, RULES), study, RULES).axes[2:]
    assert [len(axes.collections) for axes in lower] == [7, 2], "none where there is no feature"
    for axes in lower:
        for body in axes.collections:
            x, y = body.get_paths()[0].vertices.T
            widths = [np.ptp(x[y < -2]), np.ptp(x[y > -2])]
            assert widths[0] / widths[1] == pytest.approx(3)
            assert (y.min(), y.max()) == (-3, -1)


def test_any_number_of_shapes_and_sites_are_drawn() -> None:
    study = simulated_study("shared", labels=("deep", "A", "flat", "B"))
    residual = [replace(one, site="residual", hook_name="r") for one in study.layers]
    study = replace(study, layers=(*study.layers, *residual))
    found = findings(study, RULES)
    slopes, layers = slope_figure(found, study), layer_figure(found, study, RULES)
    assert [axes.get_title() for axes in slopes.axes] == [
        "mlp, by matching pursuit: shared",
        "residual, by matching pursuit: shared",
    ]
    assert len(layers.axes) == 2 * 2 * 4
    assert png_bytes(slopes).startswith(PNG)
    assert png_bytes(layers).startswith(PNG)


def test_a_shape_that_was_not_looked_at_leaves_its_panel_empty() -> None:
    study = replace(STUDY, layers=tuple(one for one in STUDY.layers if one.shape_label == "A"))
    found = findings(study, RULES)
    assert png_bytes(layer_figure(found, study, RULES)).startswith(PNG)
    assert png_bytes(slope_figure(found, study)).startswith(PNG)


def test_where_nothing_was_found_there_is_nothing_to_draw() -> None:
    nothing = {"estimate": 0.0, "low": 0.0, "high": None, "identifiable": False}
    study = replace(STUDY, layers=tuple(replace(one, **nothing) for one in STUDY.layers))
    found = findings(study, RULES)
    (axes,) = slope_figure(found, study).axes
    assert axes.containers == []
    assert png_bytes(layer_figure(found, study, RULES)).startswith(PNG)


def test_histograms_of_unequal_bins_are_not_added() -> None:
    other = replace(
        STUDY.layers[0], densities=DensityHistogram(edges=(-1, 0), counts=(1,), n_never=0)
    )
    study = replace(STUDY, layers=(other, *STUDY.layers[1:]))
    with pytest.raises(ValueError, match="2 kinds of them"):
        layer_figure(findings(study, RULES), study, RULES)
