"""What is claimed, from what: the rules, and how often they are right where the truth is known."""

from dataclasses import replace

import pytest
from simulated_studies import failed, simulated_study

from saefeat.study import Evidence, Rules, findings, judge
from saefeat.study.verdict import CONCLUSIONS, STATUSES
from saefeat.superposition.theory import DEGREE_SLOPES
from saefeat.superposition.universality.score import Estimate

RULES = Rules(n_resamples=40)
THEORIES = list(DEGREE_SLOPES)


def about(value: float, half: float = 0.1) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half)


# The slope picks a theory.


@pytest.mark.parametrize("theory", THEORIES)
def test_a_theory_is_claimed_if_the_interval_holds_its_slope_and_no_others(theory) -> None:
    found = judge(Evidence(slope=about(DEGREE_SLOPES[theory] + 0.05)), RULES)
    assert (found.status, found.theory) == ("claimed", theory)
    assert found.predicted == {"partitioned": 1, "filled": 0, "shared": -1}
    assert str(found.measured) in str(found)


@pytest.mark.parametrize(
    ("slope", "conclusion"),
    [
        (about(0.5, 0.55), "undecided"),
        (about(0, 1.2), "undecided"),
        (about(0.5), "none of the three"),
    ],
)
def test_an_interval_that_holds_several_slopes_or_none_claims_nothing(slope, conclusion) -> None:
    found = judge(Evidence(slope=slope), RULES)
    assert (found.status, found.theory, found.conclusion) == ("undecided", None, conclusion)


def test_without_a_slope_it_is_unmeasurable_with_the_reason_and_the_lower_bounds() -> None:
    evidence = Evidence(slope=None, reasons=("Coverage is low.",), at_least={"A": 2.5, "B": 4.0})
    found = judge(evidence, RULES)
    assert (found.status, found.conclusion, found.measured) == ("unmeasurable",) * 2 + (None,)
    assert "Coverage is low." in str(found)
    assert "A holds at least 2.5 features per neuron; B holds at least 4" in str(found)


def test_a_claim_is_withheld_where_random_models_have_the_slope_too() -> None:
    evidence = Evidence(slope=about(1), control_slope=about(0.95))
    found = judge(evidence, RULES)
    assert (found.status, found.theory, found.conclusion) == ("withheld", "partitioned", "withheld")
    other = judge(replace(evidence, control_slope=about(0)), RULES)
    assert other.status == "claimed"


# What else was measured says what follows.

AT_THE_BOUND = Evidence(
    slope=about(1),
    narrow_twice_load=about(0.7),
    wide_twice_load=about(1.4),
    densities_equal=True,
    universality=about(0.8),
)


@pytest.mark.parametrize(
    ("changes", "conclusion", "reason"),
    [
        ({}, "linear superposition insufficient", "above 1"),
        ({"wide_twice_load": about(0.7)}, "no contradiction", "below 1"),
        ({"wide_twice_load": about(1.05)}, "partitioned", "both sides"),
        ({"wide_twice_load": None}, "partitioned", "load was not measured"),
        ({"densities_equal": False}, "partitioned", "not shown to be equal"),
        ({"densities_equal": None}, "partitioned", "features were not measured"),
        ({"universality": about(0.5)}, "partitioned", "not above 0.5"),
        ({"universality": None}, "partitioned", "Universality was not measured"),
    ],
)
def test_superposition_is_insufficient_only_if_all_is_shown(changes, conclusion, reason) -> None:
    found = judge(replace(AT_THE_BOUND, **changes), RULES)
    assert found.status == "claimed"
    assert found.conclusion == conclusion
    assert reason in str(found)


@pytest.mark.parametrize(
    ("ratio", "conclusion"),
    [(about(0.5), "universality fails"), (about(1), "filled"), (None, "filled")],
)
def test_universality_fails_where_filled_models_hold_unequal_features(ratio, conclusion) -> None:
    assert judge(Evidence(slope=about(0), feature_ratio=ratio), RULES).conclusion == conclusion


@pytest.mark.parametrize(
    ("persistence", "conclusion"),
    [
        ({"A": 0.9, "B": 0.8}, "partition premise fails"),
        ({"A": 0.1, "B": 0.8}, "shared"),
        ({}, "shared"),
    ],
)
def test_the_partition_premise_fails_where_features_persist(persistence, conclusion) -> None:
    assert judge(Evidence(slope=about(-1), persistence=persistence), RULES).conclusion == conclusion


def test_every_conclusion_has_words_and_a_case_above() -> None:
    assert all(sentence.endswith(".") for sentence in CONCLUSIONS.values())
    assert {"claimed", "undecided", "withheld", "unmeasurable"} == set(STATUSES)


@pytest.mark.parametrize(
    "wrong", [{"level": 1.0}, {"least_replicates": 1}, {"density_margin": 0}, {"n_resamples": 3}]
)
def test_rules_that_mean_nothing_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[-1]):
        Rules(**wrong)


# How often it is right, from counts drawn with an error.


@pytest.mark.parametrize(("labels", "n_seeds"), [(("A", "B"), 4), (("deep", "A", "flat", "B"), 5)])
@pytest.mark.parametrize("theory", THEORIES)
def test_verdicts_are_right_in_9_of_10_studies_and_never_another_theorys(
    theory, labels, n_seeds
) -> None:
    n_studies = 100
    right = wrong = held = measured = 0
    for seed in range(n_studies):
        study = simulated_study(theory, seed=seed, labels=labels, n_seeds=n_seeds, shape_error=0.01)
        found = findings(study, RULES).parts[0]
        right += found.verdict.theory == theory
        wrong += found.verdict.theory not in (theory, None)
        if found.slope is not None:
            measured += 1
            held += found.slope.low <= DEGREE_SLOPES[theory] <= found.slope.high
    assert right >= 0.9 * n_studies
    assert wrong == 0
    assert held >= 0.93 * measured


@pytest.mark.parametrize("slope", [0.5, -0.5, 2.0])
def test_a_slope_that_no_theory_has_is_given_to_none(slope) -> None:
    verdicts = [findings(simulated_study(slope, seed=i), RULES).parts[0].verdict for i in range(60)]
    assert sum(found.theory is None for found in verdicts) >= 57


@pytest.mark.parametrize("theory", THEORIES)
def test_where_half_of_the_layers_fail_all_is_unmeasurable(theory) -> None:
    for seed in range(30):
        found = findings(simulated_study(theory, seed=seed, failing=0.5), RULES).parts[0]
        assert found.verdict.status == "unmeasurable"


def test_where_all_wide_layers_fail_the_lower_bounds_do_not_become_a_slope() -> None:
    study = simulated_study("partitioned", failing=0)
    layers = [failed(one, 0.3) if one.shape_label == "B" else one for one in study.layers]
    found = findings(replace(study, layers=tuple(layers)), RULES).parts[0]
    assert found.verdict.status == "unmeasurable"
    assert found.slope is None
    assert found.permutation is None
    degree = sum(0.3 * one.estimate / one.n_neurons for one in study.layers[-8:]) / 8
    assert f"B holds at least {degree:.3g}" in str(found)


def test_low_coverage_alone_is_unmeasurable() -> None:
    study = simulated_study("partitioned", failing=0)
    layers = [replace(one, coverage=0.85) for one in study.layers]
    found = findings(replace(study, layers=tuple(layers)), RULES).parts[0]
    assert found.verdict.status == "unmeasurable"
    assert "coverage is 0.85" in str(found.verdict)


def test_random_models_of_the_same_slope_withhold_the_claim() -> None:
    same = simulated_study("partitioned", control_slope="partitioned", failing=0)
    other = simulated_study("partitioned", control_slope="filled", failing=0)
    assert findings(same, RULES).parts[0].verdict.status == "withheld"
    assert findings(other, RULES).parts[0].verdict.status == "claimed"
