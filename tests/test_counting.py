"""Counts of features: of layers whose features are known, and each step against cases by hand."""

import json
from dataclasses import replace

import pytest
import torch

import saefeat as sf
from saefeat.superposition.counting import count_features
from saefeat.superposition.counting.agreement import agreement, combinations
from saefeat.superposition.counting.code_densities import code_densities
from saefeat.superposition.counting.layer_rows import LayerRows
from saefeat.superposition.counting.pursuit import Fit


def unit(rows):
    return torch.nn.functional.normalize(rows, dim=-1)


def random_directions(n, d, seed=0):
    return unit(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)))


FEW = {"picks": (1, 2, 4), "expansion_factors": (4, 8), "saes": False, "progress": False}
"""What a test can wait for."""


def count_of(n_tokens=120_000, **layer):
    truth = sf.SyntheticActivations(**{"d_in": 16, "seed": 0} | layer)
    return count_features(truth.stream(batch_size=512), n_tokens=n_tokens, **FEW), truth


@pytest.mark.parametrize(
    "layer",
    [
        {"n_features": 16, "density": 0.03},
        {"n_features": 48, "density": 0.02, "noise": 0.05},
        {"n_features": 32, "density": 0.03, "density_distribution": "zipf"},
        {"n_features": 32, "density": 0.02, "correlation": 0.3},
    ],
    ids=lambda layer: ",".join(map(str, layer.values())),
)
def test_the_features_of_a_known_layer_are_counted_blind(layer):
    count, truth = count_of(**layer)
    assert count.identifiable, count
    assert count.low <= truth.n_features <= count.high
    assert abs(count.estimate - truth.n_features) <= 0.05 * truth.n_features
    assert count.per_neuron == count.estimate / 16
    match = sf.metrics.match_features(count.directions.float(), truth.directions)
    assert match.recall() >= 0.95
    truth_load = sf.superposition.load(truth.densities, n_neurons=16)
    assert count.load == pytest.approx(truth_load, rel=0.15)


def test_features_that_never_come_without_others_are_counted_once_each():
    # Dictionaries learn parent + child in place of the child, and sums of several besides.
    count, _ = count_of(
        n_features=64, d_in=32, density=0.02, density_distribution="zipf", hierarchy=0.5
    )
    assert count.identifiable
    assert abs(count.estimate - 64) <= 5
    assert count.low <= 64 <= count.high
    assert max(step.n_combined for step in count.steps) > 0


def test_beyond_the_limit_there_is_a_lower_bound_and_no_number():
    count, truth = count_of(n_features=160, density=0.05)
    assert 2 * sf.superposition.load(truth.densities, n_neurons=16) > 2
    assert not count.identifiable
    assert count.high == float("inf")
    assert count.estimate == count.low <= 160
    assert count.reasons
    assert "beyond the detection limit, at least" in str(count)
    assert json.loads(json.dumps(count.summary(), allow_nan=False))["high"] is None


def test_noise_alone_has_no_features():
    x = torch.randn(60_000, 16, generator=torch.Generator().manual_seed(0))
    stream = sf.ActivationStream.from_tensors({"noise": x}, batch_size=512)
    count = count_features(stream, n_tokens=60_000, **FEW)
    assert not count.identifiable


def test_the_same_call_gives_the_same_count():
    first, _ = count_of(n_features=32, density=0.03, n_tokens=40_000)
    second, _ = count_of(n_features=32, density=0.03, n_tokens=40_000)
    assert first.steps == second.steps
    assert torch.equal(first.directions, second.directions)


def test_saes_stand_beside_the_count():
    truth = sf.SyntheticActivations(n_features=32, d_in=16, density=0.03)
    count = count_features(truth.stream(batch_size=512), n_tokens=60_000, **FEW | {"saes": True})
    narrow, wide = (counts.d_sae for counts in count.saes)
    assert 2 * count.estimate <= narrow < wide
    assert f"BatchTopK SAEs of {narrow} latents" in str(count)


# What is chosen, and what it is made of.


def fit_of(atoms, energy=None):
    energy = torch.ones(len(atoms)) if energy is None else torch.tensor(energy)
    return Fit(atoms=unit(atoms), offset=torch.zeros(atoms.shape[1]), energy=energy, fvu=0.1)


def test_what_two_starts_share_is_counted_and_what_one_has_is_not():
    features, ghosts = random_directions(10, 64), random_directions(3, 64, seed=1)
    fits = [fit_of(torch.cat([features, ghosts[i : i + 1]])) for i in range(3)]
    found = agreement(fits, picks=1, n_rows=1)
    assert found.n_features == found.n_strict == 10
    # A ghost that is as strong as a feature counts against the count.
    assert found.coverage == pytest.approx(1 - 3 / 33)
    assert found.shared_energy == pytest.approx(30 / 33)
    weak = [fit_of(torch.cat([features, ghosts[i : i + 1]]), [1.0] * 10 + [0.1]) for i in range(3)]
    assert agreement(weak, picks=1, n_rows=1).coverage == 1


def test_copies_and_unused_atoms_are_counted_once_and_never():
    features = random_directions(10, 64)
    copies = unit(features[:4] + 0.02 * random_directions(4, 64, seed=2))
    unused = random_directions(5, 64, seed=3)
    fits = [fit_of(torch.cat([features, copies, unused]), [1.0] * 14 + [0.0] * 5) for _ in range(2)]
    found = agreement(fits, picks=1, n_rows=1)
    assert found.n_features == 10
    assert found.shared_energy == pytest.approx(1)


def test_one_start_says_nothing():
    with pytest.raises(ValueError, match="at least 2 random starts"):
        agreement([fit_of(torch.eye(4))], picks=1, n_rows=1)


def test_the_weakest_of_dependent_directions_is_left_out():
    a, b, c, d = random_directions(4, 64)
    rows = torch.stack([a, b, unit(a + b), c, d, unit(c + 0.7 * d)])
    energy = torch.tensor([3.0, 3.0, 1.0, 3.0, 1.0, 2.0])
    assert combinations(rows, energy).nonzero()[:, 0].tolist() == [2, 4]


def test_a_parent_with_two_children_is_three_features():
    parent, first, second = random_directions(3, 64)
    rows = [parent, parent + first, parent + second, parent + first + second]
    energy = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert combinations(unit(torch.stack(rows)), energy).tolist() == [False] * 3 + [True]


def test_a_feature_that_is_on_with_many_is_not_taken_for_a_combination_of_its_sums():
    a, *others = random_directions(9, 64)
    sums = [unit(a + other) for other in others]
    rows = torch.stack([a, *others, *sums])
    energy = torch.tensor([5.0] * 9 + [1.0] * 8)
    assert combinations(rows, energy).nonzero()[:, 0].tolist() == list(range(9, 17))


@pytest.mark.parametrize(("n", "d"), [(384, 32), (100, 12), (40, 8), (12, 4), (6, 3), (2, 8)])
def test_random_directions_are_no_combinations_of_each_other(n, d):
    flagged = sum(
        int(combinations(random_directions(n, d, seed), torch.rand(n)).sum()) for seed in range(5)
    )
    assert flagged <= 1


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_densities_come_out_of_the_directions(noise):
    truth = sf.SyntheticActivations(n_features=64, d_in=32, density=0.02, noise=noise)
    rows, _ = truth.sample(20_000)
    densities = code_densities(truth.directions, torch.zeros(32), rows, picks=2)
    assert float(densities.mean()) == pytest.approx(0.02, rel=0.05)
    assert float((densities - 0.02).abs().max()) < 0.006


def test_no_features_have_no_densities():
    none = code_densities(torch.zeros(0, 8), torch.zeros(8), torch.randn(10, 8), picks=2)
    assert none.shape == (0,)


@pytest.mark.parametrize("batch_size", [3, 8, 20])
def test_batches_are_cut_anew_without_loss(batch_size):
    x = torch.arange(1.0, 61.0)[:, None]
    stream = sf.ActivationStream.from_tensors({"a": x}, batch_size=batch_size)
    parts = list(LayerRows(stream, ["a"]).batches(28, 8))
    assert [len(part) for part in parts] == [8, 8, 8, 4]
    expected = torch.cat([batch["a"] for batch in stream.batches(28)])
    assert torch.equal(torch.cat(parts), expected)


def two_layers(shared):
    """32 features in each of two layers of 16 neurons: the same in both, or others."""
    truth = sf.SyntheticActivations(n_features=64, d_in=32, density=0.02, seed=0)
    codes = truth.sample(120_000)[1].to_dense()
    directions = random_directions(64, 16).reshape(2, 32, 16)
    rows = {
        f"layer {i}": 10**i * (codes[:, :32] if shared else codes[:, 32 * i : 32 * i + 32]) @ one
        for i, one in enumerate(directions)
    }
    return sf.ActivationStream.from_tensors(rows, batch_size=512)


@pytest.mark.parametrize(("shared", "n_features"), [(True, 32), (False, 64)])
def test_layers_are_counted_jointly(shared, n_features):
    stream = two_layers(shared)
    both = count_features(stream, hook_name=stream.hooks, n_tokens=100_000, **FEW)
    one = count_features(stream, hook_name="layer 1", n_tokens=100_000, **FEW)
    assert (both.hook_name, both.n_neurons) == ("layer 0+layer 1", 32)
    assert both.estimate == pytest.approx(n_features, rel=0.05)
    assert one.estimate == pytest.approx(32, rel=0.05)
    growth = sf.metrics.feature_growth([one.estimate, both.estimate], [16, 32])
    assert growth.slope == pytest.approx(0 if shared else 1, abs=0.1)


def test_a_count_that_still_rises_is_extrapolated_and_wider():
    # Rare features that few rows have shown.
    count, truth = count_of(
        n_features=96, d_in=32, density=0.002, density_distribution="zipf", n_tokens=12_000
    )
    half, whole = [step for step in count.steps if step.stage != "width"][-2:]
    if count.identifiable:
        assert whole.n_features > 1.02 * half.n_features
        assert count.estimate > whole.n_features
        assert any("still rises" in reason for reason in count.reasons)
        assert count.high >= truth.n_features
    else:
        assert count.low <= truth.n_features


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"n_tokens": 10}, ValueError, "at least 1,000"),
        ({"seeds": [0]}, ValueError, "2 random starts at least"),
        ({"seeds": [0, 0]}, ValueError, "each once"),
        ({"picks": [4, 2]}, ValueError, "ascending order"),
        ({"expansion_factors": []}, ValueError, "ascending order"),
        ({"hook_name": "b"}, KeyError, "no hook 'b'"),
    ],
)
def test_a_bad_option_is_one_clear_error(options, error, words):
    stream = sf.ActivationStream.from_tensors({"a": torch.randn(2000, 8)}, batch_size=512)
    with pytest.raises(error, match=words):
        count_features(stream, **{"n_tokens": 2000, "progress": False} | options)


def test_a_stream_of_several_hooks_needs_one_named():
    x = torch.randn(2000, 8)
    stream = sf.ActivationStream.from_tensors({"a": x, "b": x}, batch_size=512)
    with pytest.raises(ValueError, match="name them by hook_name"):
        count_features(stream, n_tokens=2000)
    with pytest.raises(ValueError, match="saes=False"):
        count_features(stream, hook_name="a", n_tokens=2000)


def test_a_count_shows_what_it_rests_on():
    count, _ = count_of(n_features=16, density=0.03, n_tokens=40_000)
    text = str(count)
    assert "random starts: coverage" in text
    facts = json.loads(json.dumps(count.summary(), allow_nan=False))
    assert facts["steps"][-1]["stage"] == "whole"
    assert facts["per_neuron"] == count.per_neuron
    stages = [step.stage for step in replace(count, saes=()).steps]
    assert stages == sorted(stages, key=["width", "half", "whole"].index)
