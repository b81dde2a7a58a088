"""Counts over seeds: closed forms, simulated seeds, and dictionaries built by hand."""

import math
from statistics import fmean

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import saefeat as sf
from saefeat.dictionaries.base import Origin
from saefeat.dictionaries.topk import TopK
from saefeat.kernels.codes import Codes
from saefeat.metrics import ablation_costs, fraction_variance_unexplained
from saefeat.metrics.contribution import AblationCosts
from saefeat.superposition.estimators import (
    SeedCounts,
    chao2,
    chao2_interval,
    costly_latents,
    good_turing_coverage,
)
from saefeat.superposition.sae_counts import sae_counts


def found(*frequencies: int) -> Tensor:
    """`found_in` with Q_1, Q_2, … as given."""
    return torch.repeat_interleave(torch.arange(1, len(frequencies) + 1), torch.tensor(frequencies))


def seeds_drawn(chances: Tensor, n_seeds: int, generator: torch.Generator) -> Tensor:
    """In how many seeds each feature is found, if one finds feature i with `chances[i]`."""
    drawn = torch.rand(n_seeds, len(chances), generator=generator) < chances
    return drawn.sum(0)


# Chao2 and coverage.


def test_chao2_and_coverage_of_hand_counted_frequencies() -> None:
    # 10 + 5 + 30 observed; unseen 2/3 * 10 * 9 / (2 * 6) = 5.
    assert chao2(found(10, 5, 30), 3) == pytest.approx(50)
    assert good_turing_coverage(found(10, 5, 30), 3) == pytest.approx(1 - 10 / 110)
    assert chao2(found(0, 4), 2) == 4
    assert good_turing_coverage(found(0, 4), 2) == 1
    assert chao2(found(4, 0), 2) == pytest.approx(4 + 0.5 * 4 * 3 / 2)
    assert good_turing_coverage(found(4, 0), 2) == 0
    assert chao2_interval(found(0, 4), 2) == (4, 4)
    assert chao2(found(0), 2) == 0


@pytest.mark.parametrize(("n_seeds", "chance"), [(2, 0.7), (3, 0.5), (5, 0.3)])
def test_chao2_is_the_true_number_if_all_features_are_as_easy_to_find(
    generator: torch.Generator, n_seeds: int, chance: float
) -> None:
    n, estimates, inside = 300, [], 0
    for _ in range(400):
        found_in = seeds_drawn(torch.full((n,), chance), n_seeds, generator)
        found_in = found_in[found_in > 0]
        estimates.append(chao2(found_in, n_seeds))
        low, high = chao2_interval(found_in, n_seeds)
        inside += low <= n <= high
    error = torch.tensor(estimates).std() / math.sqrt(len(estimates))
    assert fmean(estimates) == pytest.approx(n, abs=4 * float(error))
    assert float(error) < n / 100
    # 95 % of 400, and four standard deviations of a binomial.
    assert inside / 400 == pytest.approx(0.95, abs=0.045)


@pytest.mark.parametrize("n_seeds", [2, 3, 6])
def test_chao2_is_between_what_was_seen_and_the_truth_if_some_are_harder_to_find(
    generator: torch.Generator, n_seeds: int
) -> None:
    chances = torch.rand(400, generator=generator) ** 2
    estimates, observed = [], []
    for _ in range(200):
        found_in = seeds_drawn(chances, n_seeds, generator)
        observed.append(int((found_in > 0).sum()))
        estimates.append(chao2(found_in[found_in > 0], n_seeds))
    assert fmean(observed) + 10 < fmean(estimates) < 400 - 10


@pytest.mark.parametrize("n_seeds", [2, 3, 6])
def test_coverage_is_the_share_of_a_seed_that_the_others_have_found(
    generator: torch.Generator, n_seeds: int
) -> None:
    chances = torch.rand(2000, generator=generator) ** 2
    estimates = []
    for _ in range(50):
        found_in = seeds_drawn(chances, n_seeds, generator)
        estimates.append(good_turing_coverage(found_in[found_in > 0], n_seeds))
    held_by_others = 1 - (1 - chances) ** (n_seeds - 1)
    truth = float((chances * held_by_others).sum() / chances.sum())
    assert fmean(estimates) == pytest.approx(truth, abs=0.005)
    # The coverage of all seeds is a little above.
    whole = float((chances * (1 - (1 - chances) ** n_seeds)).sum() / chances.sum())
    assert fmean(estimates) < whole


def test_one_seed_and_impossible_frequencies_are_refused() -> None:
    for estimator in (chao2, chao2_interval, good_turing_coverage):
        with pytest.raises(ValueError, match=r"seeds=\[0, 1, 2\]"):
            estimator(found(5), 1)
        with pytest.raises(ValueError, match="found in 1 to 2 seeds, got 1 to 3"):
            estimator(found(1, 0, 1), 2)
        with pytest.raises(ValueError, match="got 0 to 1"):
            estimator(torch.tensor([0, 1]), 2)
    with pytest.raises(ValueError, match="all latents dead"):
        good_turing_coverage(found(0), 2)


def test_the_counts_of_planted_seeds(generator: torch.Generator) -> None:
    """Of 40 features seed 0 holds 0-29 and seed 1 10-39; one latent of each is not counted."""
    truth = normalize(torch.randn(40, 64, generator=generator), dim=1)
    counted = [torch.arange(30) != 29, torch.arange(30) != 0]
    counts = SeedCounts.of([truth[:30], truth[10:]], counted)
    assert counts.per_seed == (29, 29)
    assert (counts.n_observed, counts.n_stable) == (40, 18)
    assert counts.chao2 == chao2(found(22, 18), 2)
    assert counts.coverage == pytest.approx(1 - 22 / 58)
    assert counts.chao2_low < counts.chao2 < counts.chao2_high
    none = SeedCounts.of([truth, truth], [torch.zeros(40, dtype=torch.bool)] * 2)
    assert (none.n_observed, none.chao2, none.coverage) == (0, 0, None)


# What a latent's ablation costs.


def sparse_rows(n: int, d_sae: int, k: int, generator: torch.Generator) -> Tensor:
    dense = torch.rand(n, d_sae, generator=generator, dtype=torch.float64)
    return dense * (dense >= dense.topk(k, dim=1).values[:, -1:])


def test_the_cost_of_each_latent_is_that_of_removing_it(generator: torch.Generator) -> None:
    dense = sparse_rows(60, 12, 3, generator)
    dense[:, 7] = 0
    decoder = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    target = dense @ decoder + torch.randn(60, 5, generator=generator, dtype=torch.float64)
    costs = ablation_costs(Codes.from_dense(dense), decoder, target, dense @ decoder)
    whole = fraction_variance_unexplained(target, dense @ decoder)
    for latent in range(12):
        without = dense.clone()
        without[:, latent] = 0
        added = fraction_variance_unexplained(target, without @ decoder) - whole
        assert float(costs[latent]) == pytest.approx(float(added), abs=1e-12)
    assert float(costs[7]) == 0


def test_costs_of_batches_are_those_of_all_rows_with_a_bias_far_away(
    generator: torch.Generator,
) -> None:
    dense = sparse_rows(50, 8, 2, generator)
    decoder = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    recon = dense @ decoder + 100
    target = recon + 0.1 * torch.randn(50, 4, generator=generator, dtype=torch.float64)
    sums = AblationCosts(decoder)
    for start in range(0, 50, 17):
        rows = slice(start, start + 17)
        sums.update(Codes.from_dense(dense[rows]), target[rows], recon[rows])
    whole = ablation_costs(Codes.from_dense(dense), decoder, target, recon)
    torch.testing.assert_close(sums.share_of_variance, whole)


def test_the_only_latent_costs_its_second_moment_and_a_harmful_one_less_than_nothing() -> None:
    values = torch.tensor([[0.0], [0.0], [3.0]])
    x = values @ torch.tensor([[1.0, 0.0]])
    costs = ablation_costs(Codes.from_dense(values), torch.tensor([[1.0, 0.0]]), x, x)
    assert float(costs[0]) == pytest.approx(9 / 6)  # the mean is (1, 0): deviations 1, 1, 4
    codes = Codes.from_dense(torch.tensor([[1.0], [0.0], [0.0]]))
    recon = torch.tensor([[1.0, 0.0], [0.0, 0.0], [3.0, 0.0]])
    assert float(ablation_costs(codes, torch.tensor([[1.0, 0.0]]), x, recon)[0]) < 0


def test_codes_of_another_dictionary_are_refused() -> None:
    codes = Codes.from_dense(torch.ones(3, 4))
    with pytest.raises(ValueError, match="4 latents in 3 rows do not go with a decoder of 5"):
        AblationCosts(torch.ones(5, 2)).update(codes, torch.ones(3, 2), torch.ones(3, 2))


def test_costly_latents_are_those_above_the_gap() -> None:
    costs = torch.tensor([1.0, 1.3, 0.7, 0.008, 0.012, 0.0, -0.5])
    assert costly_latents(costs).tolist() == [True, True, True, False, False, False, False]
    assert costly_latents(costs, 0.001).tolist() == [True] * 5 + [False] * 2
    assert not costly_latents(torch.tensor([0.0, -1.0])).any()
    with pytest.raises(ValueError, match="share positive, got share=0"):
        costly_latents(costs, 0)
    with pytest.raises(ValueError, match="1 costs that are not finite"):
        costly_latents(torch.tensor([1.0, torch.nan]))


# All of them from a bank.


def built(directions: Tensor, seed: int, factor: float, k: int = 8) -> TopK:
    """A dictionary whose encoder and decoder are these directions, made to fire when they are."""
    d_sae, d_in = directions.shape
    origin = Origin(hook_name="a", expansion_factor=factor, seed=seed)
    sae = TopK(sf.TopKConfig(k=k), d_in, d_sae, origin)
    with torch.no_grad():
        sae.encoder.copy_(directions)
        sae.W_dec.copy_(directions)
    return sae


@pytest.fixture
def stream(generator: torch.Generator) -> sf.ActivationStream:
    """Coordinates 0 to 19 on in a tenth of the rows each; 20 to 23 are faint noise."""
    x = (torch.rand(4000, 24, generator=generator) < 0.1) * (
        1 + torch.rand(4000, 24, generator=generator)
    )
    x[:, 20:] = 0.02 * torch.rand(4000, 4, generator=generator)
    return sf.ActivationStream.from_tensors({"a": x}, batch_size=300, held_out_fraction=0.5)


def test_a_bank_is_counted_by_every_estimator(stream: sf.ActivationStream) -> None:
    """Seed 0 lacks features 18 and 19, seed 1 lacks 16 and 17; both have the noise as ghosts."""
    axes = torch.eye(24)
    held = [[*range(18), 20, 21, 22, 23], [*range(16), 18, 19, 20, 21, 22, 23]]
    bank = sf.Bank(
        {
            ("a", 22 / 24, seed): built(axes[one], seed, 22 / 24, k=22)
            for seed, one in enumerate(held)
        }
    )
    (counts,) = sae_counts(bank, stream, n_tokens=1500, progress=False)
    assert (counts.hook_name, counts.seeds, counts.d_sae, counts.d_in) == ("a", (0, 1), 22, 24)
    assert counts.n_tokens == 1500
    assert counts.alive.per_seed == (22, 22)
    assert (counts.alive.n_observed, counts.alive.n_stable) == (24, 20)
    assert counts.costly.per_seed == (18, 18)
    assert (counts.costly.n_observed, counts.costly.n_stable) == (20, 16)
    assert counts.costly.chao2 == chao2(found(4, 16), 2)
    assert counts.costly.coverage == pytest.approx(1 - 4 / 36)
    assert counts.distinct == counts.costly
    assert len(counts.densities) == 36
    assert list(counts.densities) == sorted(counts.densities, reverse=True)
    assert sum(counts.densities) / 36 == pytest.approx(0.1, rel=0.05)
    assert counts.cosine == 0.8
    assert counts.split_share == (0, 0)
    assert all(17.5 < effective < 20 for effective in counts.effective)
    x = torch.cat([batch["a"] for batch in stream.held_out_batches(1500)])
    variance = (x - x.mean(0)).square().sum()
    for missing, fvu, l0 in zip(((18, 19), (16, 17)), counts.fvu, counts.l0, strict=True):
        assert fvu == pytest.approx(float(x[:, missing].square().sum() / variance), rel=1e-5)
        on = (x > 0).double()
        assert l0 == pytest.approx(float((on.sum(1) - on[:, missing].sum(1)).mean()))


def test_the_width_curve_shows_splitting_and_dead_latents_do_not_count(
    stream: sf.ActivationStream, generator: torch.Generator
) -> None:
    """In the wide dictionary two near copies share each of four features, and 12 rows are dead."""
    axes = torch.eye(24)
    bank = {}
    for seed in (0, 1):
        bank["a", 1.0, seed] = built(axes[:20], seed, 20 / 24)
        copies = normalize(axes[:4] + 0.05 * torch.randn(4, 24, generator=generator), dim=1)
        dead = normalize(torch.randn(12, 24, generator=generator), dim=1)
        wide = built(torch.cat([axes[:20], copies, dead]), seed, 1.5, k=36)
        with torch.no_grad():
            wide.encoder[:4] /= 2
            wide.encoder[20:24] /= 2
            wide.encoder[24:] = 0
        bank["a", 1.5, seed] = wide
    narrow, wide = sae_counts(sf.Bank(dict(reversed(bank.items()))), stream, progress=False)
    assert (narrow.d_sae, wide.d_sae) == (20, 36)
    assert (narrow.alive.per_seed, wide.alive.per_seed) == ((20, 20), (24, 24))
    assert narrow.split_share == (0, 0)
    assert wide.split_share == pytest.approx((8 / 24, 8 / 24))
    assert narrow.alive.n_stable == narrow.distinct.n_stable == 20
    # The copies cost their share and are as stable as features, until they are merged.
    assert wide.alive.n_stable == wide.costly.n_stable == 24
    assert wide.distinct.per_seed == (20, 20)
    assert len(wide.densities) == len(narrow.densities) == 40
    assert wide.distinct.n_stable == 20
    assert wide.distinct.coverage == 1


def test_a_bank_that_cannot_be_counted_is_refused(stream: sf.ActivationStream) -> None:
    one = sf.Bank({("a", 1.0, 3): built(torch.eye(24), 3, 1.0)})
    with pytest.raises(ValueError, match=r"needs at least 2 seeds, better 3, and .* seed 3 only"):
        sae_counts(one, stream, progress=False)
    two = sf.Bank({("a", 1.0, seed): built(torch.eye(24), seed, 1.0) for seed in (0, 1)})
    with pytest.raises(KeyError, match="no hook 'b'; it has a"):
        sae_counts(two, stream, hook_name="b", progress=False)
    other = sf.ActivationStream.from_tensors({"c": torch.rand(50, 24)}, batch_size=10)
    with pytest.raises(KeyError, match="stream has no hook 'a'"):
        sae_counts(two, other, progress=False)
    with pytest.raises(ValueError, match="n_tokens must be at least 2"):
        sae_counts(two, stream, n_tokens=1, progress=False)
    widths = {"a": 12, "b": 12}
    crosscoders = sf.Bank(
        {("a+b", *key[1:]): one.with_origin(hook_widths=widths) for key, one in two.items()}
    )
    for hook_name in (None, "a"):
        with pytest.raises(ValueError, match="reads several hooks"):
            sae_counts(crosscoders, stream, hook_name=hook_name, progress=False)
