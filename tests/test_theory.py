"""Arithmetic of shapes, scaling laws and capacity, against the figures that papers quote."""

import doctest
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import saefeat as sf
from saefeat.superposition.theory import (
    DEGREE_SLOPES,
    GAUSSIAN_L1_CONSTANT,
    LOSS_FROM_COMPUTE,
    LOSS_FROM_PARAMETERS,
    LOSS_FROM_PARAMETERS_AND_TOKENS,
    LOSS_FROM_TOKENS,
    WIDENING_EXPONENTS,
    FittedLaw,
    PowerLaw,
    Shape,
    capacity,
    load,
    max_degree,
    max_degree_with_square_term,
    max_density,
    scaling_laws,
    shape_ratios,
    shapes,
    widening_ratios,
)

DEEP = Shape(n_layers=48, d_model=1600)
"""Kaplan et al. 2020, fig. 5: within 3 % of the loss of the next one."""
FLAT = Shape(n_layers=6, d_model=4288)

sizes = st.floats(1e-3, 1e6)
sparse = st.floats(1e-12, 0.367)


@pytest.mark.parametrize("module", [shapes, scaling_laws, capacity])
def test_the_examples_in_docstrings_print_what_they_say(module) -> None:
    failed, tried = doctest.testmod(module)
    assert tried > 0
    assert failed == 0


# Shapes.


def test_kaplans_pair_is_as_quoted() -> None:
    assert (round(FLAT.n_parameters / 1e9, 3), round(DEEP.n_parameters / 1e9, 3)) == (1.324, 1.475)
    assert (round(FLAT.aspect_ratio), round(DEEP.aspect_ratio)) == (715, 33)
    assert (FLAT.n_neurons, DEEP.n_neurons) == (25_728, 76_800)
    ratios = shape_ratios(DEEP, FLAT)
    assert round(ratios["features per neuron"], 2) == 2.99, "psi, as the note predicts it"
    assert ratios["features"] == 1


def test_the_pair_of_the_equal_parameter_study_is_exactly_equal() -> None:
    narrow = Shape(n_layers=8, d_model=48)
    assert narrow.n_parameters == 221_184
    assert narrow.widened(2) == Shape(n_layers=2, d_model=96)
    assert narrow.widened(2).n_parameters == 221_184


def test_twice_the_width_fills_the_table_of_the_note() -> None:
    assert widening_ratios(2) == {
        "parameters": 1,
        "neurons per layer": 2,
        "layers": 1 / 4,
        "neurons": 1 / 2,
        "features": 1,
        "features per layer": 4,
        "features per neuron": 2,
        "aspect ratio": 8,
    }


@given(n_layers=sizes, d_model=sizes, factor=st.floats(0.01, 100))
def test_ratios_of_a_widened_shape_are_powers_of_the_factor(
    n_layers: float, d_model: float, factor: float
) -> None:
    shape = Shape(n_layers=n_layers, d_model=d_model)
    expected = widening_ratios(factor)
    assert shape_ratios(shape, shape.widened(factor)) == pytest.approx(expected, rel=1e-9)
    assert expected.keys() == WIDENING_EXPONENTS.keys()


@given(n_layers=sizes, d_model=sizes, n_features=st.floats(0, 1e9))
def test_the_degree_is_twelve_f_d_over_n(
    n_layers: float, d_model: float, n_features: float
) -> None:
    shape = Shape(n_layers=n_layers, d_model=d_model)
    degree = shape.degree(n_features)
    assert degree == pytest.approx(12 * n_features * d_model / shape.n_parameters, rel=1e-9)
    assert degree == pytest.approx(shape.features_per_layer(n_features) / d_model, rel=1e-9)


def test_slopes_are_those_of_features_in_one_layer_in_filled_layers_and_in_all_layers() -> None:
    narrow, wide = Shape(n_layers=8, d_model=48), Shape(n_layers=2, d_model=96)
    degrees = {
        "partitioned": [shape.degree(6000) for shape in (narrow, wide)],
        "filled": [3 * shape.d_model / shape.d_model for shape in (narrow, wide)],
        "shared": [6000 / shape.d_model for shape in (narrow, wide)],
    }
    for name, (one, other) in degrees.items():
        assert math.log2(other / one) == pytest.approx(DEGREE_SLOPES[name])


@pytest.mark.parametrize("bad", [0, -1, math.inf, math.nan])
def test_sizes_that_cannot_be_are_errors(bad: float) -> None:
    shape = Shape(n_layers=2, d_model=8)
    for make in (
        lambda: Shape(n_layers=bad, d_model=8),
        lambda: Shape(n_layers=2, d_model=bad),
        lambda: shape.widened(bad),
        lambda: widening_ratios(bad),
        lambda: LOSS_FROM_PARAMETERS.loss(bad),
        lambda: LOSS_FROM_PARAMETERS.amount(bad),
        lambda: PowerLaw(critical=bad, exponent=0.1),
        lambda: PowerLaw(critical=1, exponent=bad),
        lambda: max_degree(0.01, constant=bad),
        lambda: max_density(10.0, constant=bad),
    ):
        with pytest.raises(ValueError, match=f"above 0, got {bad}"):
            make()
    for count in (shape.degree, shape.features_per_layer):
        assert count(0) == 0
        with pytest.raises(ValueError, match="n_features"):
            count(-1 if bad == 0 else -abs(bad))


# Scaling laws.


def test_a_loss_gap_is_worth_what_is_quoted_in_parameters() -> None:
    assert round(LOSS_FROM_PARAMETERS.worth(0.01), 2) == 1.14
    assert round(LOSS_FROM_PARAMETERS.worth(0.03), 2) == 1.48
    assert LOSS_FROM_PARAMETERS.worth(0) == 1
    larger = 1e8 * LOSS_FROM_PARAMETERS.worth(0.03)
    gap = LOSS_FROM_PARAMETERS.loss(1e8) / LOSS_FROM_PARAMETERS.loss(larger) - 1
    assert gap == pytest.approx(0.03, rel=1e-9)
    for bad in (-1.0, -2.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="fraction of the loss"):
            LOSS_FROM_PARAMETERS.worth(bad)


@pytest.mark.parametrize(
    ("law", "critical", "exponent"),
    [
        (LOSS_FROM_PARAMETERS, 8.8e13, 0.076),
        (LOSS_FROM_TOKENS, 5.4e13, 0.095),
        (LOSS_FROM_COMPUTE, 3.1e8, 0.050),
    ],
)
def test_each_law_falls_from_one_nat_by_its_exponent_and_inverts(
    law: PowerLaw, critical: float, exponent: float
) -> None:
    assert law.loss(critical) == 1
    assert law.loss(critical / 1e6) == pytest.approx(10 ** (6 * exponent), rel=1e-9)
    for amount in (1.0, 1e3, 1e9, 1e15):
        assert law.amount(law.loss(amount)) == pytest.approx(amount, rel=1e-9)


def test_the_joint_law_has_the_two_single_laws_as_its_limits() -> None:
    joint = LOSS_FROM_PARAMETERS_AND_TOKENS
    for amount in (1e5, 1e8, 1e11):
        assert joint.loss(amount, math.inf) == pytest.approx(joint.parameters.loss(amount))
        assert joint.loss(math.inf, amount) == pytest.approx(joint.tokens.loss(amount))
        assert joint.loss(amount, 1e9) > joint.loss(amount, 1e10) > joint.parameters.loss(amount)


def test_the_joint_law_by_hand() -> None:
    """(64000^(.076 / .103) + 1800)^.103."""
    expected = (64_000 ** (76 / 103) + 1_800) ** 0.103
    assert LOSS_FROM_PARAMETERS_AND_TOKENS.loss(1e9, 1e10) == pytest.approx(expected, rel=1e-9)


def test_constants_from_memory_agree_with_those_that_are_not() -> None:
    joint = LOSS_FROM_PARAMETERS_AND_TOKENS
    for n_parameters in (1e5, 1.5e9):
        assert joint.loss(n_parameters, math.inf) == pytest.approx(
            LOSS_FROM_PARAMETERS.loss(n_parameters), rel=0.06
        )
    for n_tokens in (1e7, 2.3e10):
        assert joint.loss(math.inf, n_tokens) == pytest.approx(
            LOSS_FROM_TOKENS.loss(n_tokens), rel=0.06
        )
    # Kaplan et al. 2020, eq. 4.4: data that holds overfitting below 2 %.
    for n_parameters in (1e6, 1e9):
        needed = joint.n_tokens(1.02 * joint.parameters.loss(n_parameters), n_parameters)
        assert needed == pytest.approx(5e3 * n_parameters**0.74, rel=0.15)


@given(n_parameters=st.floats(1e4, 1e12), n_tokens=st.floats(1e6, 1e12))
def test_the_inverses_of_the_joint_law_give_back_what_went_in(
    n_parameters: float, n_tokens: float
) -> None:
    joint = LOSS_FROM_PARAMETERS_AND_TOKENS
    loss = joint.loss(n_parameters, n_tokens)
    assert joint.n_parameters(loss, n_tokens) == pytest.approx(n_parameters, rel=1e-4)
    assert joint.n_tokens(loss, n_parameters) == pytest.approx(n_tokens, rel=1e-4)


def test_a_loss_that_one_resource_forbids_is_an_error_that_says_which() -> None:
    joint = LOSS_FROM_PARAMETERS_AND_TOKENS
    with pytest.raises(ValueError, match=r"1e\+09 tokens, which alone keep it above 2\.7"):
        joint.n_parameters(2.0, 1e9)
    with pytest.raises(ValueError, match=r"1e\+06 parameters, which alone keep it above 3\.9"):
        joint.n_tokens(2.0, 1e6)


# Capacity.


def test_the_most_features_per_neuron_are_as_quoted() -> None:
    assert round(max_degree(0.1), 2) == 4.34
    assert round(max_degree(0.01), 1) == 21.7
    assert round(max_degree(0.001), 1) == 144.8
    assert sf.superposition.max_degree(p=0.01) == max_degree(0.01)
    assert GAUSSIAN_L1_CONSTANT == 2
    assert max_degree(0.01, GAUSSIAN_L1_CONSTANT) == pytest.approx(max_degree(0.01) / 2)


def test_twice_the_features_per_neuron_need_densities_lower_by_what_is_quoted() -> None:
    for p, factor in ((0.1, 2.94), (0.01, 2.38), (0.001, 2.23)):
        for constant in (1.0, GAUSSIAN_L1_CONSTANT):
            rarer = max_density(2 * max_degree(p, constant), constant)
            assert round(p / rarer, 2) == factor


@given(p=sparse, constant=st.floats(0.1, 10))
def test_the_densest_features_at_the_bound_are_those_it_came_from(
    p: float, constant: float
) -> None:
    # Near 1/e the bound is flat, and its inverse as ill-conditioned as the root of rounding.
    assert max_density(max_degree(p, constant), constant) == pytest.approx(p, rel=1e-6)


@given(p=sparse, rarer=st.floats(0.01, 0.99))
def test_rarer_features_fit_more_to_a_neuron(p: float, rarer: float) -> None:
    assert max_degree(p * rarer) > max_degree(p) > math.e


@pytest.mark.parametrize("p", [0, -0.1, 1 / math.e, 0.5, 0.99, 1, 2, math.nan])
def test_a_density_at_which_the_bound_says_nothing_is_an_error(p: float) -> None:
    assert max_degree(1 / math.e - 1e-6) == pytest.approx(math.e)
    with pytest.raises(ValueError, match=r"1/e = 0\.3679\), got .* largest at 1/e"):
        max_degree(p)
    with pytest.raises(ValueError, match=r"largest at 1/e"):
        max_degree_with_square_term(p, 32)


@pytest.mark.parametrize("constant", [1.0, 2.0])
def test_a_degree_that_every_density_allows_has_no_largest_density(constant: float) -> None:
    for degree in (math.e / constant, 1.0, 0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"e / C = {math.e / constant:.4g} are allowed"):
            max_density(degree, constant)
    assert max_density(math.e / constant + 1e-6, constant) == pytest.approx(1 / math.e, rel=1e-2)


@given(p=sparse, factor=st.floats(0.1, 10))
def test_with_the_square_term_every_shape_has_room_for_as_many_features(
    p: float, factor: float
) -> None:
    narrow = Shape(n_layers=800, d_model=1000)
    wide = Shape(n_layers=800 / factor**2, d_model=1000 * factor)
    room = [
        max_degree_with_square_term(p, shape.d_model) * shape.n_neurons for shape in (narrow, wide)
    ]
    assert room[1] == pytest.approx(room[0], rel=1e-9)
    assert room[0] == pytest.approx(narrow.n_parameters / 12 * max_degree(p), rel=1e-9)
    assert max_degree(p) * wide.n_neurons == pytest.approx(
        max_degree(p) * narrow.n_neurons / factor
    ), "by the linear bound the wide shape has less"


def test_the_square_term_by_hand() -> None:
    n = 32 * max_degree_with_square_term(0.01, 32)
    assert n * 0.01 * math.log(100) == pytest.approx(32**2)


# Load.


@pytest.mark.parametrize(
    ("n", "p", "m", "twice"),
    [
        (64, 0.01, 32, 0.18),
        (128, 0.01, 32, 0.37),
        (256, 0.01, 32, 0.74),
        (128, 0.03, 32, 0.84),
        (256, 0.03, 32, 1.68),
        (256, 0.003, 32, 0.28),
        (512, 0.01, 32, 1.47),
        (3200, 20 / 3200, 100, 2.03),
    ],
)
def test_load_of_equal_densities_is_as_quoted(n: int, p: float, m: int, twice: float) -> None:
    for densities in ([p] * n, (p,) * n, torch.full((n,), p), torch.full((n,), p).double()):
        assert round(2 * load(densities, m), 2) == twice


@given(p=sparse, m=st.integers(1, 1000), constant=st.floats(0.1, 10))
def test_load_reaches_one_over_the_constant_at_the_most_features_per_neuron(
    p: float, m: int, constant: float
) -> None:
    per_feature = load([p], m)
    assert per_feature * m * max_degree(p, constant) == pytest.approx(1 / constant, rel=1e-9)


def test_load_of_unequal_densities_by_hand() -> None:
    densities = [0.5, 0.25, 0.0, 1.0, 0.125]
    expected = math.log(2) * (0.5 + 0.25 * 2 + 0.125 * 3) / 4
    assert sf.superposition.load(densities, n_neurons=4) == pytest.approx(expected, rel=1e-12)
    assert load(torch.tensor(densities), 4) == pytest.approx(expected, rel=1e-12)


def test_features_never_on_or_always_on_and_no_features_add_no_load() -> None:
    assert load([0.0, 1.0, 0, 1], 3) == 0
    assert load([], 3) == 0
    assert load(torch.zeros(0), 3) == 0


def test_past_one_over_e_a_denser_feature_adds_less_load_than_itself() -> None:
    assert load([1 / math.e], 1) == pytest.approx(1 / math.e)
    for p in (0.4, 0.7, 0.99):
        assert load([p], 1) < p
    assert load([0.3], 1) > 0.3


def test_load_needs_no_gradient_and_keeps_none() -> None:
    assert type(load(torch.full((3,), 0.1, requires_grad=True), 2)) is float


@pytest.mark.parametrize("bad", [-1e-9, 1.0001, math.nan, math.inf, -2.5])
def test_densities_that_cannot_be_are_an_error_that_names_the_first(bad: float) -> None:
    for densities in ([0.1, bad, 0.2, bad], torch.tensor([0.1, bad, 0.2, bad])):
        with pytest.raises(ValueError, match=r"feature 1 has .* the first of 2 outside"):
            load(densities, 4)


def test_load_wants_one_row_of_densities_and_a_neuron() -> None:
    with pytest.raises(ValueError, match=r"got shape \(2, 3\).*one layer at a time"):
        load(torch.full((2, 3), 0.1), 4)
    for n_neurons in (0, -3):
        with pytest.raises(ValueError, match=f"n_neurons={n_neurons}"):
            load([0.1], n_neurons)
        with pytest.raises(ValueError, match=f"n_neurons={n_neurons}"):
            max_degree_with_square_term(0.1, n_neurons)


def test_a_fitted_law_is_the_one_that_losses_follow() -> None:
    law = PowerLaw(critical=1e9, exponent=0.08)
    sizes = [1e4, 3e4, 1e5, 3e5]
    exact = FittedLaw.of(sizes, [law.loss(n) for n in sizes])
    assert exact.law.exponent == pytest.approx(0.08)
    assert exact.law.critical == pytest.approx(1e9)
    assert exact.worst < 1e-9


def test_the_interval_of_a_fitted_exponent_covers() -> None:
    law, generator = PowerLaw(critical=1e9, exponent=0.08), np.random.default_rng(0)
    sizes = np.repeat([1e4, 3e4, 1e5, 3e5], 2)
    covered = 0
    for _ in range(400):
        noise = np.exp(0.01 * generator.standard_normal(len(sizes)))
        fitted = FittedLaw.of(
            list(sizes), [law.loss(n) * e for n, e in zip(sizes, noise, strict=True)]
        )
        covered += fitted.low <= 0.08 <= fitted.high
    assert 0.92 <= covered / 400 <= 0.98


@pytest.mark.parametrize(
    ("sizes", "losses", "words"),
    [
        ([1e4, 1e4, 1e5], [2.0, 2.0, 1.8], "three different"),
        ([1e4, 1e5], [2.0, 1.8], "three different"),
        ([1e4, 1e5, 1e6], [1.8, 2.0, 2.2], "do not fall"),
        ([1e4, 1e5, 1e6], [2.0, -1.8, 1.6], "loss"),
    ],
)
def test_losses_that_no_law_fits_are_an_error(sizes, losses, words) -> None:
    with pytest.raises(ValueError, match=words):
        FittedLaw.of(sizes, losses)
