"""From observations to findings: records, replicates, the table and what is not measured."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from simulated_studies import failed, simulated_study

import saefeat as sf
from saefeat.study import (
    DensityHistogram,
    JointObservation,
    LayerObservation,
    Observations,
    PairObservation,
    Rules,
    findings,
)
from saefeat.study.replicates import shape_counts
from saefeat.superposition.counting import FeatureCount
from saefeat.superposition.counting.feature_count import Step
from saefeat.superposition.sae_counts import count_recipe
from saefeat.superposition.theory import load
from saefeat.superposition.universality.score import Estimate, Score

RULES = Rules(n_resamples=40)
EXACT = simulated_study("partitioned", failing=0, spread=0, count_error=0)


def row_of(study: Observations, name: str):
    return next(row for row in findings(study, RULES).parts[0].table if row.name == name)


def pair(seed: int, *, u: float = 0.8, log2_ratio: float | None = 0.01) -> PairObservation:
    values = Estimate(value=u, low=u - 0.1, high=u + 0.1)
    scores = [
        Score(
            null_name=name, matched=values, null=values, again=values, u=replace(values, value=one)
        )
        for name, one in (("shifted", u + 0.1), ("token identity", u))
    ]
    return PairObservation(
        narrow_label="A",
        narrow_seed=seed,
        wide_label="B",
        wide_seed=seed,
        site="mlp",
        instrument="matching_pursuit",
        hook_names=("blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post"),
        n_matched=30,
        least_correlation=0.5,
        log2_density_ratio=log2_ratio,
        standard_error=0.05,
        scores=tuple(scores),
    )


def whole(study: Observations) -> Observations:
    """With everything that can be observed."""
    joint = [
        JointObservation(
            shape_label=label,
            model_seed=seed,
            control="trained",
            site="mlp",
            reuse=1.1 + 0.01 * seed,
        )
        for label in ("A", "B")
        for seed in range(4)
    ]
    pairs = [pair(seed, u=0.8 + 0.01 * seed, log2_ratio=0.02 * seed) for seed in range(4)]
    return replace(study, joint=tuple(joint), pairs=tuple(pairs), protocol={"seeds": [0, 1, 2, 3]})


# Records.


def test_observations_go_through_json_unchanged() -> None:
    study = whole(simulated_study("partitioned", control_slope=0.0))
    assert Observations.from_dict(json.loads(json.dumps(study.to_dict()))) == study


@pytest.mark.parametrize("name", ["layers", "models", "joint", "pairs", "shapes"])
def test_a_field_that_is_missing_or_unknown_is_named(name) -> None:
    facts = whole(simulated_study("partitioned")).to_dict()
    first = dict(facts[name][0])
    first["unheard_of"] = 1
    with pytest.raises(ValueError, match="unknown key 'unheard_of'"):
        Observations.from_dict({**facts, name: [first]})
    with pytest.raises(ValueError, match="lacks the key"):
        Observations.from_dict({**facts, name: [{}]})


@pytest.mark.parametrize(
    "wrong",
    [
        {"control": "frozen"},
        {"site": "attention"},
        {"instrument": "guess"},
        {"load": math.nan},
        {"low": 1e9},
        {"n_neurons": 0},
    ],
)
def test_a_layer_that_cannot_be_is_refused(wrong) -> None:
    with pytest.raises(ValueError):
        replace(EXACT.layers[0], **wrong)


def test_an_observation_twice_or_of_an_unlisted_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="observed twice"):
        replace(EXACT, layers=(*EXACT.layers, EXACT.layers[0]))
    with pytest.raises(ValueError, match=r"records of \['C'\]"):
        replace(EXACT, layers=(replace(EXACT.layers[0], shape_label="C"),))
    with pytest.raises(ValueError, match="narrow shape and a wider"):
        replace(EXACT, pair=("B", "A"))


def test_a_histogram_holds_every_feature() -> None:
    densities = torch.tensor([0.0, 1e-9, 0.0105, 0.012, 1.0])
    found = DensityHistogram.of(densities)
    assert sum(found.counts) + found.n_never == len(densities)
    assert found.n_never == 1
    assert found.counts[0] == 1, "rarer than the first edge"
    assert found.counts[-1] == 1
    bin_of = np.searchsorted(found.edges, math.log10(0.011), side="right") - 1
    assert found.counts[bin_of] == 2


def test_a_count_becomes_an_observation_also_where_it_has_no_upper_end() -> None:
    step = Step(
        stage="whole",
        d_sae=8,
        picks=1,
        n_tokens=1000,
        n_features=3,
        n_strict=3,
        n_combined=0,
        shared_energy=0.5,
        coverage=0.5,
        chao2=4.0,
        fvu=0.25,
    )
    count = FeatureCount(
        hook_name="blocks.1.mlp.hook_post",
        n_neurons=8,
        estimate=3.0,
        low=3.0,
        high=math.inf,
        coverage=0.5,
        identifiable=False,
        reasons=("Coverage 0.50 is below 0.9.",),
        load=0.1,
        n_tokens=1000,
        seeds=(0, 1),
        steps=(step,),
        directions=torch.eye(8)[:3],
        densities=torch.tensor([0.1, 0.2, 0.3]),
    )
    found = LayerObservation.of_count(count, shape_label="A", model_seed=0, site="mlp", layer=1)
    assert found.high is None
    assert found.l0 == pytest.approx(0.6)
    assert (found.fvu, found.coverage, found.reasons) == (0.25, 0.5, count.reasons)
    json.dumps(replace(EXACT, layers=(found,)).to_dict(), allow_nan=False)


def test_what_seeds_of_saes_share_becomes_an_observation_of_the_second_instrument() -> None:
    truth = sf.SyntheticActivations(n_features=8, d_in=16, density=0.1)
    stream = truth.stream(batch_size=512, held_out_rows=4000)
    bank = sf.train(
        stream,
        count_recipe(1),
        expansion_factors=[2],
        seeds=(0, 1),
        n_tokens=250_000,
        device="cpu",
        progress=False,
    )
    (counts,) = sf.sae_counts(bank, stream, progress=False)
    place = {"shape_label": "A", "model_seed": 0, "site": "mlp", "layer": 1}
    found = LayerObservation.of_sae_counts(counts, n_tokens=250_000, **place)
    assert (found.instrument, found.n_neurons, found.identifiable) == ("batch_topk", 16, True)
    assert found.estimate == counts.distinct.n_stable == 8
    # Densities of the two seeds together are twice those of one.
    assert found.l0 == pytest.approx(truth.l0, rel=0.15)
    assert found.load == pytest.approx(load(truth.densities, 16), rel=0.15)
    assert sum(found.densities.counts) == sum(counts.distinct.per_seed)
    facts = json.loads(json.dumps(replace(EXACT, layers=(found,)).to_dict(), allow_nan=False))
    assert Observations.from_dict(facts).layers == (found,)

    uncovered = replace(counts, distinct=replace(counts.distinct, coverage=0.5))
    bound = LayerObservation.of_sae_counts(uncovered, n_tokens=250_000, **place)
    assert (bound.identifiable, bound.high, bound.low) == (False, None, 8)
    assert "Coverage 0.50 is below 0.9" in bound.reasons[0]


# Replicates.


def test_a_replicate_is_the_mean_over_its_layers() -> None:
    counts = shape_counts("A", EXACT.layers, RULES)
    assert [one.features_per_neuron for one in counts.replicates] == pytest.approx([3.0] * 4)
    assert [one.n_layers for one in counts.replicates] == [8] * 4
    assert counts.count_sd == pytest.approx(-math.log(0.96) / 1.96, rel=1e-4)


def test_a_layer_that_failed_is_given_what_its_shape_lets_expect() -> None:
    layers = list(EXACT.layers)
    # The fullest layer of one model, which is a fifth above the mean: left out it would bias.
    place = max(range(8), key=lambda i: layers[i].estimate)
    layers[place] = failed(layers[place])
    counts = shape_counts("A", layers, RULES)
    assert counts.replicates[0].n_filled == 1
    assert counts.replicates[0].features_per_neuron == pytest.approx(3.0)
    # A model that holds twice as much everywhere holds twice as much there too.
    double = [
        replace(
            one,
            **{name: 2 * getattr(one, name) for name in ("estimate", "low", "load", "l0")},
            high=2 * one.high,
        )
        if (one.shape_label, one.model_seed, one.layer != place) == ("A", 0, True)
        else one
        for one in layers
    ]
    assert shape_counts("A", double, RULES).replicates[0].features_per_neuron == pytest.approx(6.0)


def test_a_layer_that_fails_in_most_models_is_not_filled() -> None:
    layers = [
        failed(one) if (one.layer, one.model_seed > 0) == (3, True) else one for one in EXACT.layers
    ]
    counts = shape_counts("A", layers, RULES)
    assert counts.replicates == ()
    assert counts.reasons == ("A: layer 3 could be counted in less than half of the models.",)


def test_a_shape_of_too_few_models_says_how_many_it_needs() -> None:
    layers = [one for one in EXACT.layers if one.model_seed < 3]
    assert "3 models" in shape_counts("A", layers, RULES).reasons[0]
    assert shape_counts("C", layers, RULES).reasons == ("C was not counted.",)


# The table and the rest.


@pytest.mark.parametrize("theory", ["partitioned", "filled", "shared"])
def test_a_study_that_obeys_a_theory_measures_what_it_predicts(theory) -> None:
    study = simulated_study(theory, failing=0, spread=0, count_error=0)
    found = findings(study, RULES).parts[0]
    names = ["features, summed over layers", "features per layer", "features per neuron"]
    for name in (*names, "2 x load", "L0 per layer", "neurons", "layers", "aspect ratio"):
        row = next(row for row in found.table if row.name == name)
        assert row.measured.value == pytest.approx(row.predicted[theory]), name
    assert found.verdict.theory == theory


def test_the_table_has_the_ratios_of_the_note() -> None:
    predicted = {
        row.name: row.predicted["partitioned"] for row in findings(EXACT, RULES).parts[0].table
    }
    assert predicted["parameters"] == 1
    assert predicted["neurons per layer"] == 2
    assert predicted["layers"] == 1 / 4
    assert predicted["neurons"] == 1 / 2
    assert predicted["features, each counted once"] == 1
    assert predicted["features per layer"] == 4
    assert predicted["features per neuron"] == 2
    assert predicted["aspect ratio"] == 8


def test_neurons_are_those_that_features_were_counted_on() -> None:
    rows = {row.name: row for row in findings(EXACT, RULES).parts[0].table}
    # Of the MLPs, four times as wide as the stream.
    assert (rows["neurons per layer"].narrow, rows["neurons per layer"].wide) == (4 * 48, 4 * 96)
    assert (rows["neurons"].narrow, rows["neurons"].wide) == (4 * 48 * 8, 4 * 96 * 2)
    for row in (rows["features per layer"], rows["features, summed over layers"]):
        neurons = rows["neurons per layer" if "per layer" in row.name else "neurons"]
        assert row.narrow / neurons.narrow == pytest.approx(rows["features per neuron"].narrow)
        assert row.wide / neurons.wide == pytest.approx(rows["features per neuron"].wide)


def test_layers_that_stand_for_all_are_added_up_to_all() -> None:
    def sums(study: Observations) -> list[float]:
        names = ("features, summed over layers", "features, each counted once")
        return [row_of(study, name).narrow for name in names]

    layers = tuple(replace(one, estimate=600.0, low=590.0, high=610.0) for one in EXACT.layers)
    whole_study = whole(replace(EXACT, layers=layers))
    some = tuple(one for one in layers if one.layer % 2)
    assert sums(replace(whole_study, layers=some)) == pytest.approx(sums(whole_study))


def test_where_a_shape_could_not_be_counted_the_table_has_its_lower_bounds() -> None:
    layers = [failed(one, 0.3) if one.shape_label == "B" else one for one in EXACT.layers]
    found = findings(replace(EXACT, layers=tuple(layers)), RULES).parts[0]
    rows = {row.name: row for row in found.table}
    for name, value in (
        ("features per neuron", 0.3 * 6),
        ("features per layer", 0.3 * 6 * 4 * 96),
        ("features, summed over layers", 0.3 * 6 * 4 * 96 * 2),
    ):
        assert rows[name].wide == pytest.approx(value)
        assert rows[name].are_bounds == (False, True)
        assert rows[name].measured is None, "a ratio to a lower bound is no measurement"
    assert rows["2 x load"].wide is None
    line = next(line for line in str(found).splitlines() if line.startswith("features per neuron"))
    assert line.split()[3:6] == ["3", "≥", "1.8"]
    assert line.endswith("not measured")


def test_the_table_goes_to_json_with_theories_and_measured_ratios() -> None:
    facts = json.loads(json.dumps(findings(whole(EXACT), RULES).to_dict()))
    rows = {row["name"]: row for row in facts["parts"][0]["table"]}
    degree = rows["features per neuron"]
    assert degree["predicted"] == {"partitioned": 2.0, "filled": 1.0, "shared": 0.5}
    assert degree["measured"]["low"] < degree["measured"]["value"] < degree["measured"]["high"]
    assert degree["measured"]["value"] == pytest.approx(2)
    held = rows["layers that hold a latent"]
    assert (held["narrow"], held["wide"]) == pytest.approx((1.115, 1.115))
    assert held["measured"]["value"] == pytest.approx(1)
    assert held["predicted"] == {"partitioned": 1.0, "filled": None, "shared": 0.25}


def test_what_was_not_measured_is_said_so_and_not_made_up() -> None:
    found = findings(EXACT, RULES).parts[0]
    assert found.universality is None
    assert found.density_equivalence is None
    assert found.reuse == {}
    assert found.control_slope is None
    text = str(found)
    for name in ("features, each counted once", "density of matched features", "universality U"):
        line = next(line for line in text.splitlines() if line.startswith(name))
        assert line.endswith("not measured")
    assert "No random models were looked at." in text


def test_everything_that_was_measured_is_in_the_findings() -> None:
    found = findings(whole(EXACT), RULES).parts[0]
    assert found.universality_null == "token identity", "the null that leaves least"
    assert found.universality.value == pytest.approx(0.815)
    assert found.density_equivalence.is_equivalent
    assert found.density_equivalence.estimate.value == pytest.approx(0.03)
    assert found.reuse["A"].value == pytest.approx(1.115)
    once = next(row for row in found.table if row.name == "features, each counted once")
    assert once.narrow == pytest.approx(
        np.mean([3.0 * 192 * 8 / (1.1 + 0.01 * i) for i in range(4)])
    )
    assert once.measured.value == pytest.approx(1)
    json.dumps(findings(whole(EXACT), RULES).to_dict(), allow_nan=False)


def test_what_pursuit_cannot_match_saes_do() -> None:
    """The study pairs SAEs alone; without them the count that goes furthest could claim nothing."""
    study = whole(simulated_study("partitioned", failing=0, degree=20, count_error=0))
    by_saes = tuple(replace(one, instrument="batch_topk") for one in study.pairs)
    for pairs, is_said in ((study.pairs, False), (by_saes, True)):
        found = findings(replace(study, pairs=pairs), RULES).parts[0]
        assert found.instrument == "matching_pursuit"
        assert found.verdict.conclusion == "linear superposition insufficient"
        assert ("are those of BatchTopK SAEs" in str(found)) == is_said
    # SAEs whose decoder stays as it was drawn have learned nothing that could be matched.
    layers = tuple(replace(one, instrument="frozen_decoder") for one in study.layers)
    found = findings(replace(study, layers=layers, pairs=by_saes), RULES).parts[0]
    assert found.universality is None


def test_joint_counts_go_before_sums_over_layers() -> None:
    study = whole(EXACT)
    joint = [
        replace(one, n_features=100.0 + one.model_seed + 50 * (one.shape_label == "B"))
        for one in study.joint
    ]
    assert row_of(replace(study, joint=tuple(joint)), "features, each counted once").narrow == 101.5


def test_a_model_in_two_pairs_is_refused() -> None:
    study = replace(EXACT, pairs=(pair(0), replace(pair(0), wide_seed=1)))
    with pytest.raises(ValueError, match="no model in common"):
        findings(study, RULES)


def test_unequal_losses_are_said_with_what_they_are_worth() -> None:
    equal = findings(simulated_study("partitioned", wide_loss=1.356), RULES)
    unequal = findings(simulated_study("partitioned", wide_loss=1.3635), RULES)
    assert "Losses" not in str(equal)
    assert unequal.loss_gap == pytest.approx(0.01)
    assert "unequal by 1.00% (0.5% is allowed), which is worth 1.14 times" in str(unequal)


def test_each_site_and_instrument_has_a_finding_of_its_own() -> None:
    layers = [replace(one, site="residual", hook_name="r") for one in EXACT.layers]
    both = replace(EXACT, layers=(*EXACT.layers, *layers))
    assert [one.site for one in findings(both, RULES).parts] == ["mlp", "residual"]
    with pytest.raises(ValueError, match="no layer was counted"):
        findings(replace(EXACT, layers=()), RULES)


def test_the_narrow_model_is_saturated_above_half_the_bound() -> None:
    def saturated(degree: float) -> bool | None:
        study = simulated_study("partitioned", failing=0, degree=degree)
        return findings(study, RULES).parts[0].saturated

    # 2 x load is 2 psi p ln(1/p) = 0.092 psi.
    assert saturated(3.0) is False
    assert saturated(8.0) is True
    assert saturated(0.5 / 0.0921) is None
