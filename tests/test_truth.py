"""Scores against known features: hand-made cases, sae-lens, and a dictionary that was learned."""

import math

import pytest
import torch
from torch import Tensor

import saefeat as sf
from saefeat.kernels.codes import Codes
from saefeat.metrics import dead_fraction, l0_ratio, match_features, on_share_by_decile


@pytest.fixture
def directions(generator: torch.Generator) -> Tensor:
    """Twelve unit vectors, of which no two have a cosine of 0.9."""
    x = torch.nn.functional.normalize(torch.randn(12, 16, generator=generator), dim=1)
    assert float((x @ x.T).fill_diagonal_(0).max()) < 0.8
    return x


# Matching.


def test_the_truth_itself_has_every_score_at_1(directions: Tensor) -> None:
    match = match_features(directions, directions)
    assert match.latents.tolist() == match.features.tolist() == list(range(12))
    assert (match.recall(), match.precision()) == (1, 1)
    assert match.mcc == pytest.approx(1, abs=1e-6)


def test_order_and_length_do_not_matter(directions: Tensor, generator: torch.Generator) -> None:
    order = torch.randperm(12, generator=generator)
    lengths = torch.rand(12, 1, generator=generator) + 0.1
    match = match_features(lengths * directions[order], directions)
    assert torch.equal(match.features[match.latents.argsort()], order)
    assert match.mcc == pytest.approx(1, abs=1e-6)


def test_half_of_the_features_are_half_of_the_recall(directions: Tensor) -> None:
    match = match_features(directions[::2], directions)
    assert (match.recall(), match.precision()) == (0.5, 1)
    assert match.mcc == pytest.approx(0.5, abs=1e-6)


def test_a_latent_found_twice_is_precise_once(directions: Tensor) -> None:
    match = match_features(torch.cat([directions] * 3), directions)
    assert (match.recall(), match.precision()) == (1, pytest.approx(1 / 3))
    assert match.mcc == pytest.approx(1 / 3, abs=1e-6)
    assert len(set(match.features.tolist())) == len(set(match.latents.tolist())) == 12


def test_only_latents_that_are_alive_are_matched(directions: Tensor) -> None:
    alive = torch.arange(12) % 3 == 1
    match = match_features(directions, directions, alive=alive)
    assert match.latents.tolist() == match.features.tolist() == [1, 4, 7, 10]
    assert (match.n_latents, match.n_features) == (4, 12)
    assert (match.recall(), match.precision()) == (pytest.approx(1 / 3), 1)


def test_where_all_latents_are_dead_every_score_is_0(directions: Tensor) -> None:
    match = match_features(directions, directions, alive=torch.zeros(12, dtype=torch.bool))
    assert (match.recall(), match.precision(), match.mcc) == (0, 0, 0)
    null = match_features(torch.zeros(5, 16), directions)
    assert (null.recall(), null.precision(), null.mcc) == (0, 0, 0)


def test_a_direction_turned_round_is_another(directions: Tensor) -> None:
    match = match_features(-directions[:1], directions[:1])
    assert float(match.cosines) == pytest.approx(-1, abs=1e-6)
    assert (match.recall(), match.mcc) == (0, 0)


def test_the_least_cosine_decides_what_is_found() -> None:
    features = torch.eye(2)
    angle = math.acos(0.85)
    decoder = torch.tensor([[math.cos(angle), math.sin(angle)], [0.0, 1.0]])
    match = match_features(decoder, features)
    assert match.cosines.tolist() == pytest.approx([0.85, 1.0])
    assert (match.n_found(), match.n_found(0.8), match.n_found(0.86)) == (1, 2, 1)
    assert match.mcc == pytest.approx(1.85 / 2)


def test_the_sum_of_cosines_is_largest_not_the_first_that_fits() -> None:
    """Both latents are nearest to feature 0; only exchanged do they make the larger sum."""
    decoder = torch.tensor([[0.9, 0.1, 0.0], [1.0, 0.0, 0.9]])
    match = match_features(decoder, torch.eye(3)[:2] + 0.0)
    pairs = dict(zip(match.latents.tolist(), match.features.tolist(), strict=True))
    unit = torch.nn.functional.normalize(decoder, dim=1)
    straight, exchanged = unit[0, 0] + unit[1, 1], unit[0, 1] + unit[1, 0]
    assert (pairs == {0: 0, 1: 1}) == bool(straight > exchanged)
    assert float(match.cosines.sum()) == pytest.approx(float(max(straight, exchanged)))


def test_directions_that_cannot_be_matched_are_refused(directions: Tensor) -> None:
    with pytest.raises(ValueError, match="no features to match"):
        match_features(directions, directions[:0])
    with pytest.raises(ValueError, match="Did training diverge"):
        match_features(directions.clone().fill_diagonal_(math.nan), directions)


@pytest.mark.parametrize("n_latents", [5, 12, 30])
def test_mcc_is_that_of_sae_lens_but_for_what_is_left_over(
    n_latents: int, directions: Tensor, generator: torch.Generator
) -> None:
    """Theirs is the mean over pairs of absolute cosines: the same sum of those that are positive,
    over the fewer of the two instead of the more."""
    evals = pytest.importorskip("sae_lens.synthetic.evals")
    noisy = directions.repeat(3, 1)[:n_latents]
    noisy = (noisy + 0.05 * torch.randn(n_latents, 16, generator=generator)).abs()
    truth = directions.abs()
    match = match_features(noisy, truth)
    theirs = evals.mean_correlation_coefficient(noisy, truth)
    fewer, more = sorted((n_latents, 12))
    assert match.mcc * more / fewer == pytest.approx(theirs, abs=1e-6)


# Codes.


def test_l0_ratio_and_dead_latents_of_a_hand_written_example() -> None:
    codes = Codes.from_dense(torch.tensor([[1.0, 0, 2, 0], [0, 0, 3, 0], [0, 0, 0, 0]]))
    truth = Codes.from_dense(torch.tensor([[1.0, 1], [0, 0], [0, 0]]))
    assert l0_ratio(codes, truth) == pytest.approx(1.5)
    assert dead_fraction(codes) == 0.5
    assert dead_fraction(Codes.from_dense(torch.zeros(3, 4))) == 1
    with pytest.raises(ValueError, match="of 3 rows and the true codes of 2"):
        l0_ratio(codes, Codes.from_dense(torch.ones(2, 2)))
    with pytest.raises(ValueError, match="No feature is on in any of 3"):
        l0_ratio(codes, Codes.from_dense(torch.zeros(3, 2)))
    with pytest.raises(ValueError, match="there are no rows"):
        dead_fraction(Codes.from_dense(torch.zeros(0, 4)))


def test_deciles_of_a_hand_written_example() -> None:
    """Latent 1, of feature 0, is on in 20 of 30 rows with activations 1 to 20 in mixed order; its
    feature is on where the activation passes 10, and in one of the two rows of decile 0."""
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    dense = torch.zeros(30, 3)
    dense[:20, 1] = order + 1.0
    dense[20:, 0] = 1.0  # of feature 1, which is never on
    dense[:9, 2] = 1.0  # too rare to have deciles
    truth = torch.zeros(30, 4)
    truth[:20, 0] = ((order >= 10) | (order == 1)).float()
    truth[:9, 2] = 1.0
    decoder, features = torch.eye(4)[:3], torch.eye(4)[[1, 0, 2, 3]]
    match = match_features(decoder, features)
    both = on_share_by_decile(Codes.from_dense(dense), Codes.from_dense(truth), match)
    # In each decile two rows of latent 1, and one of latent 0.
    assert both.tolist() == pytest.approx([1 / 3, 0, 0, 0, 0] + [2 / 3] * 5)
    dense[20:, 0] = 0
    alone = on_share_by_decile(Codes.from_dense(dense), Codes.from_dense(truth), match)
    assert alone.tolist() == [0.5, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    # A stored 0 is off: here every entry of the truth is stored.
    stored = Codes.from_rows(torch.arange(4).expand(30, 4), truth, 4)
    assert torch.equal(on_share_by_decile(Codes.from_dense(dense), stored, match), alone)


def test_deciles_leave_out_latents_that_are_no_features() -> None:
    dense = torch.arange(1.0, 101)[:, None]
    truth = Codes.from_dense(torch.ones(100, 1))
    match = match_features(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0]]))
    assert on_share_by_decile(Codes.from_dense(dense), truth, match).isnan().all()
    loose = on_share_by_decile(Codes.from_dense(dense), truth, match, least_cosine=0.7)
    assert loose.tolist() == [1.0] * 10
    swapped = match_features(torch.eye(3), torch.eye(3))
    with pytest.raises(ValueError, match="Were they exchanged"):
        on_share_by_decile(Codes.from_dense(dense), truth, swapped)


# A dictionary that was learned.


def test_a_learned_dictionary_scores_as_it_should() -> None:
    """24 features in 16 dimensions, one in 25 on; two latents of 32 are on in every row."""
    truth = sf.SyntheticActivations(n_features=24, d_in=16, density=0.04, seed=0)
    bank = sf.train(
        truth.stream(batch_size=256),
        sf.TopKConfig(k=2),
        expansion_factors=[2],
        n_tokens=100_000,
        device="cpu",
        progress=False,
    )
    sae = bank["synthetic", 2, 0]
    x, true_codes = truth.sample(20_000)
    codes = sae.encode(x)
    match = match_features(sae.W_dec, truth.directions, alive=codes.firing_counts() > 20)
    assert match.recall() > 0.9
    assert match.precision() > 0.8
    assert match.mcc > 0.8
    assert 1.5 < l0_ratio(codes, true_codes) <= 2 / float(sf.metrics.l0(true_codes))
    shares = on_share_by_decile(codes, true_codes, match)
    # The second latent of most rows is on for want of a better one: weakly, and wrongly.
    assert float(shares[0]) < 0.3
    assert float(shares[-1]) > 0.8
    with torch.random.fork_rng():
        torch.manual_seed(0)
        untrained = match_features(torch.randn(32, 16), truth.directions)
    assert untrained.recall() < 0.1
    assert untrained.mcc < match.mcc - 0.2
