"""Diagnostics of latents, each on data that was built to show what it looks for."""

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from saefeat.kernels.codes import Codes
from saefeat.superposition.diagnostics import (
    CoActivation,
    absorption_by_narrower,
    absorption_of_feature,
    child_parent_pairs,
    classify,
    cluster_sizes,
    compositions,
    low_activations,
    splits,
    splitting,
)
from saefeat.superposition.diagnostics.composition import nearest_sums


def directions(n: int, d: int, generator: torch.Generator) -> Tensor:
    return normalize(torch.randn(n, d, generator=generator), dim=1)


def on(n: int, chances: list[float], generator: torch.Generator) -> Tensor:
    """Independent firing, `[n, latents]` of 0 and 1."""
    return (torch.rand(n, len(chances), generator=generator) < torch.tensor(chances)).float()


# Co-activation.


def test_co_activation_of_batches_is_the_dense_product(generator: torch.Generator) -> None:
    dense = torch.randn(90, 12, generator=generator).relu()
    other = torch.randn(90, 7, generator=generator).relu()
    within, between = CoActivation(12), CoActivation(12, 7)
    for start in range(0, 90, 40):
        rows = slice(start, start + 40)
        codes = Codes.from_rows(torch.arange(12).expand(len(dense[rows]), 12), dense[rows], 12)
        within.update(codes)
        between.update(codes, Codes.from_dense(other[rows]))
    fires, other_fires = (dense > 0).long(), (other > 0).long()
    assert torch.equal(torch.from_numpy(within.counts.toarray()), fires.T @ fires)
    assert torch.equal(torch.from_numpy(between.counts.toarray()), fires.T @ other_fires)
    assert torch.equal(within.firing, fires.sum(0))
    assert torch.equal(between.other_firing, other_fires.sum(0))
    assert within.n_rows == 90
    latents, others = torch.tensor([0, 3]), torch.tensor([5, 6])
    expected = (fires[:, latents] * other_fires[:, others]).sum(0) / fires[:, latents].sum(0)
    torch.testing.assert_close(between.given(latents, others).float(), expected)


def test_co_activation_refuses_what_is_not_of_the_same_rows() -> None:
    codes = Codes.from_dense(torch.ones(3, 4))
    with pytest.raises(ValueError, match="within one dictionary take one"):
        CoActivation(4).update(codes, codes)
    with pytest.raises(ValueError, match="Encode the same rows with both"):
        CoActivation(4, 4).update(codes, Codes.from_dense(torch.ones(2, 4)))
    with pytest.raises(ValueError, match="Encode the same rows"):
        CoActivation(5).update(codes)


# Composition.


def test_latents_are_classified_by_the_true_features_exactly(generator: torch.Generator) -> None:
    truth = directions(40, 96, generator)
    sums = normalize(
        truth[[3, 5, 30]] + truth[[4, 6, 31]] * torch.tensor([[1.0], [0.5], [1.0]]), dim=1
    )
    decoder = torch.cat([truth[:10], sums, directions(5, 96, generator), torch.zeros(1, 96)])
    kinds = classify(3 * decoder, truth)
    assert kinds.is_single.nonzero()[:, 0].tolist() == list(range(10))
    assert kinds.is_sum.nonzero()[:, 0].tolist() == [10, 11, 12]
    assert kinds.is_neither.nonzero()[:, 0].tolist() == list(range(13, 18))
    assert kinds.first[:10].tolist() == list(range(10))
    pairs = [set(pair) for pair in zip(kinds.first.tolist(), kinds.second.tolist(), strict=True)]
    assert pairs[10:13] == [{3, 4}, {5, 6}, {30, 31}]
    assert kinds.first[13:].tolist() == kinds.second[13:].tolist() == [-1] * 6
    assert (kinds.second[:10] == -1).all()
    # 3, 4, 5 and 6 have latents of their own, 30 and 31 have none.
    assert kinds.is_beside.nonzero()[:, 0].tolist() == [10, 11]
    assert kinds.is_in_place.nonzero()[:, 0].tolist() == [12]


def test_a_difference_and_a_trace_of_a_second_feature_are_no_sums(
    generator: torch.Generator,
) -> None:
    truth = torch.linalg.qr(torch.randn(64, 6, generator=generator)).Q.T
    away = normalize(truth[[0]] - truth[[1]], dim=1)
    trace = normalize(truth[[2]] + 0.1 * truth[[3]], dim=1)
    kinds = classify(torch.cat([away, trace]), truth)
    assert kinds.is_neither.tolist() == [True, False]
    assert kinds.is_single.tolist() == [False, True]


@pytest.mark.parametrize("by_second", [False, True])
def test_the_best_sum_is_that_of_least_squares(generator: torch.Generator, by_second: bool) -> None:
    """Against solving each pair of parts by itself, in a plane through features not orthogonal."""
    parts, queries = directions(7, 4, generator).double(), directions(9, 4, generator).double()
    found = nearest_sums(
        queries, parts, same=0.999, least_weight=0.3, candidates=7, by_second=by_second
    )
    for n, query in enumerate(queries):
        best = []
        for i, j in combinations(range(7), 2):
            weights = torch.linalg.lstsq(parts[[i, j]].T, query[:, None]).solution[:, 0]
            if weights.min() <= 0 or weights.min() < 0.3 * weights.max():
                continue
            first, second = (i, j) if parts[i] @ query > parts[j] @ query else (j, i)
            left = query - (parts[first] @ query) * parts[first]
            other = parts[second] - (parts[first] @ parts[second]) * parts[first]
            beyond = float(torch.cosine_similarity(left, other, dim=0))
            cosine = float((weights @ parts[[i, j]]).norm())
            best.append((beyond if by_second else cosine, cosine, beyond, first, second))
        _, cosine, beyond, first, second = max(best, default=(0, 0.0, 0.0, -1, -1))
        assert (int(found.first[n]), int(found.second[n])) == (first, second)
        assert float(found.cosines[n]) == pytest.approx(cosine, abs=1e-6)
        assert float(found.beyond_one[n]) == pytest.approx(beyond, abs=1e-6)


def test_blocks_of_queries_find_what_all_at_once_find(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = directions(50, 8, generator)
    whole = compositions(decoder)
    monkeypatch.setattr("saefeat.superposition.diagnostics.composition._BLOCK_ELEMENTS", 9000)
    blocks = compositions(decoder)
    torch.testing.assert_close(blocks.cosines, whole.cosines)
    assert torch.equal(blocks.first, whole.first)


def test_planted_sums_are_found_without_labels_and_told_in_place_from_beside(
    generator: torch.Generator,
) -> None:
    """Latents 0 to 59 are features; 60 is 0 + 1 and fires in their place, 61 is 2 + 3, beside."""
    features = directions(60, 96, generator)
    sums = normalize(features[[0, 2]] + features[[1, 3]], dim=1)
    found = compositions(torch.cat([features, sums]))
    assert {60, 61} <= set(found.is_composed.nonzero()[:, 0].tolist())
    # Of the others one in a hundred by chance; 4 is far in the tail of that.
    assert int(found.is_composed.sum()) <= 2 + 4
    # Their sum makes neither 0 and 1 nor 2 and 3 composed themselves.
    assert not found.is_composed[:4].any()
    assert [{int(found.first[i]), int(found.second[i])} for i in (60, 61)] == [{0, 1}, {2, 3}]
    assert (found.cosines[60:] > 0.999).all()
    fires = on(5000, [0.2] * 60, generator)
    both = fires[:, [0, 2]] * fires[:, [1, 3]]
    fires[:, [0, 1]] -= both[:, [0]]
    counts = CoActivation(62)
    counts.update(Codes.from_dense(torch.cat([fires, both], dim=1)))
    first, second = found.parts_on(counts)
    composed = found.is_composed.nonzero()[:, 0].tolist()
    for given in (first, second):
        assert float(given[composed.index(60)]) == 0
        assert float(given[composed.index(61)]) == 1


def test_where_nothing_is_composed_there_are_no_parts() -> None:
    found = compositions(torch.eye(3, 8))
    assert not found.is_composed.any()
    assert [len(given) for given in found.parts_on(CoActivation(3))] == [0, 0]


def test_random_dictionaries_are_composed_no_oftener_than_chance_even_in_an_uneven_space(
    generator: torch.Generator,
) -> None:
    """Rows that vary along a few axes are near each other's sums, as rows drawn likewise are."""
    scales = torch.logspace(0, -1.5, 48)
    decoder = torch.randn(1000, 48, generator=generator) * scales
    even = compositions(torch.randn(1000, 48, generator=generator))
    uneven = compositions(decoder)
    assert uneven.threshold > even.threshold + 0.1
    for found in (even, uneven):
        # Each share is a binomial of 1000 and about 1 %, and so is the threshold's own error.
        assert found.share < 0.01 + 5 * math.sqrt(2 * 0.01 / 1000)


def test_another_seed_lends_its_parts(generator: torch.Generator) -> None:
    features = directions(30, 64, generator)
    mine = torch.cat(
        [torch.zeros(1, 64), normalize(features[:1] + features[1:2], dim=1), features[2:]]
    )
    other = features[torch.randperm(30, generator=generator)]
    assert not compositions(mine).is_composed[1]
    found = compositions(mine, other)
    assert found.is_composed[1]
    assert not found.is_composed[0]
    parts = other[torch.stack([found.first[1], found.second[1]])]
    torch.testing.assert_close(parts.sum(0), features[:2].sum(0))
    assert len(found.null) == 29


def test_too_few_parts_make_no_sum_and_bad_options_are_refused(generator: torch.Generator) -> None:
    lonely = compositions(torch.eye(4)[:1])
    assert lonely.cosines.tolist() == [0]
    assert lonely.first.tolist() == [-1]
    assert lonely.share == 0
    with pytest.raises(ValueError, match="every decoder row is 0"):
        compositions(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="0 < quantile < 1"):
        compositions(torch.eye(4), quantile=1.0)
    with pytest.raises(ValueError, match="same must be above 0"):
        compositions(torch.eye(4), same=0.0)


# Splitting.


def test_clusters_of_copies_are_counted(generator: torch.Generator) -> None:
    rows = directions(8, 64, generator)
    rows = torch.cat([rows, rows[:2], rows[:1], torch.zeros(2, 64)])
    assert cluster_sizes(rows).tolist() == [3, 2, 1, 1, 1, 1, 1, 1]


@pytest.fixture
def split_dictionaries(generator: torch.Generator) -> tuple[CoActivation, Tensor, Tensor]:
    """Narrow 0 is divided among wide 0 and 1; 1 is kept as 2 with a special case 3; 2 is kept as
    4, and wide 5, of another direction, is on where 2 is; 3 never fires; 4 lost its latent."""
    axes = torch.eye(64)
    narrow = axes[:5]
    near = 0.6 * axes[[0, 0, 1, 1, 2]] + 0.3 * axes[10:15]
    wide = normalize(torch.cat([near, axes[20:21]]), dim=1)
    fires = on(4000, [0.2, 0.3, 0.1, 0.0, 0.1], generator)
    coin = on(4000, [0.5, 0.25], generator)
    wide_fires = torch.stack(
        [
            fires[:, 0] * coin[:, 0],
            fires[:, 0] * (1 - coin[:, 0]),
            fires[:, 1],
            fires[:, 1] * coin[:, 1],
            fires[:, 2],
            fires[:, 2],
        ],
        dim=1,
    )
    counts = CoActivation(5, 6)
    counts.update(Codes.from_dense(fires), Codes.from_dense(wide_fires))
    return counts, narrow, wide


def test_a_split_latent_is_told_from_one_that_kept_its_meaning(
    split_dictionaries: tuple[CoActivation, Tensor, Tensor],
) -> None:
    found = splits(*split_dictionaries)
    assert found.is_split.tolist() == [True, False, False, False, False]
    assert found.n_children.tolist() == [2, 2, 1, 0, 0]
    assert float(found.effective_children[0]) == pytest.approx(2, abs=0.01)
    assert float(found.effective_children[2]) == 1
    assert found.effective_children[3:].tolist() == [0, 0]
    assert float(found.covered[0]) == pytest.approx(1)
    assert float(found.largest_share[0]) == pytest.approx(0.5, abs=0.06)
    assert float(found.largest_share[1]) == 1
    assert math.isnan(found.largest_share[3])
    assert float(found.covered[4]) == 0
    assert found.share == 1 / 4


def test_splits_are_the_same_however_few_pairs_are_looked_at_at_once(
    split_dictionaries: tuple[CoActivation, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = splits(*split_dictionaries)
    monkeypatch.setattr(splitting, "PAIRS_AT_ONCE", 2)
    parts = splits(*split_dictionaries)
    assert len(whole.parents) > 2
    for name in ("parents", "children", "shares", "is_split"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))


def test_splits_refuse_counts_of_other_dictionaries(
    split_dictionaries: tuple[CoActivation, Tensor, Tensor],
) -> None:
    counts, narrow, wide = split_dictionaries
    with pytest.raises(ValueError, match=r"CoActivation\(d_narrow, d_wide\)"):
        splits(counts, wide, narrow)
    with pytest.raises(ValueError, match="between 5 and 5 latents"):
        splits(CoActivation(5), narrow, narrow)
    with pytest.raises(ValueError, match="must be in"):
        splits(counts, narrow, wide, most=0.0)


# Absorption.


def absorbed_codes(generator: torch.Generator) -> tuple[Codes, Tensor, Tensor, Tensor]:
    """Latent 0 is a parent, silent wherever child 1, whose row holds its direction, is on.

    Child 2 leaves its parent alone, and in a tenth of its rows the parent is missed for no reason.
    """
    axes = torch.eye(32)
    fires = on(3000, [0.3, 0.2, 0.2, 0.3], generator)
    parent = torch.maximum(torch.maximum(fires[:, 0], fires[:, 1]), fires[:, 2])
    dropped = (1 - fires[:, 1]) * fires[:, 2] * on(3000, [0.1], generator)[:, 0]
    latents = fires.clone()
    latents[:, 0] = parent * (1 - fires[:, 1]) * (1 - dropped)
    values = latents * (1 + 0.2 * torch.rand(3000, 4, generator=generator))
    decoder = torch.stack([axes[0], normalize(axes[0] + axes[1], dim=0), axes[2], axes[3]])
    values[:, 1] *= 2**0.5
    return Codes.from_dense(values), decoder, parent > 0, fires


def test_absorption_counts_the_rows_that_a_child_with_the_parents_direction_takes(
    generator: torch.Generator,
) -> None:
    codes, decoder, is_on, fires = absorbed_codes(generator)
    found = absorption_of_feature(codes, decoder, 0, 5 * decoder[0], is_on)
    missed = is_on & (codes.to_dense()[:, 0] == 0)
    n_child = int(fires[:, 1].sum())
    assert (found.n_on, found.n_missed) == (int(is_on.sum()), int(missed.sum()))
    assert found.n_missed > n_child + 20
    assert found.absorbers == {1: n_child}
    assert found.n_absorbed == n_child
    assert found.rate == pytest.approx(n_child / int(is_on.sum()))


def test_nothing_is_absorbed_without_a_child_or_by_one_that_is_weak(
    generator: torch.Generator,
) -> None:
    codes, decoder, is_on, _ = absorbed_codes(generator)
    alone = absorption_of_feature(codes, torch.eye(32)[:4], 0, decoder[0], is_on)
    assert (alone.n_absorbed, alone.absorbers) == (0, {})
    assert alone.n_missed > 0
    weak = codes.to_dense()
    weak[:, 1] *= 0.2
    found = absorption_of_feature(Codes.from_dense(weak), decoder, 0, decoder[0], is_on)
    assert found.n_absorbed == 0
    never = absorption_of_feature(codes, decoder, 0, decoder[0], torch.zeros_like(is_on))
    assert never.n_on == 0
    assert math.isnan(never.rate)


def test_a_copy_of_the_parents_latent_absorbs_nothing(generator: torch.Generator) -> None:
    """The parent's rows are divided between two latents of one direction."""
    codes, decoder, is_on, _ = absorbed_codes(generator)
    whole = absorption_of_feature(codes, decoder, 0, decoder[0], is_on)
    halves = codes.to_dense()
    other = halves[:, :1] * (torch.arange(3000) % 2)[:, None]
    halves[:, :1] -= other
    split = Codes.from_dense(torch.cat([halves, other], dim=1))
    copied = torch.cat([decoder, decoder[:1]])
    assert absorption_of_feature(split, copied, 0, decoder[0], is_on) == whole
    told_apart = absorption_of_feature(split, copied, 0, decoder[0], is_on, same=1.1)
    assert told_apart.n_missed > whole.n_missed


def test_a_narrower_dictionary_tells_the_same_absorption_without_labels(
    generator: torch.Generator,
) -> None:
    """It has the parent, unabsorbed, as its latent 1, and latent 3 of the wider one as its 0."""
    codes, decoder, is_on, fires = absorbed_codes(generator)
    narrow = Codes.from_dense(torch.stack([fires[:, 3], is_on.float()], dim=1))
    found = absorption_by_narrower(codes, decoder, narrow, decoder[[3, 0]])
    assert [one.latent for one in found] == [3, 0]
    assert found[0].n_missed == found[0].n_absorbed == 0
    assert found[1] == absorption_of_feature(codes, decoder, 0, decoder[0], is_on)


def test_absorption_refuses_what_does_not_belong_together(generator: torch.Generator) -> None:
    codes, decoder, is_on, _ = absorbed_codes(generator)
    with pytest.raises(ValueError, match="latent below 4"):
        absorption_of_feature(codes, decoder, 4, decoder[0], is_on)
    with pytest.raises(ValueError, match="a direction other than 0"):
        absorption_of_feature(codes, decoder, 0, 0 * decoder[0], is_on)
    with pytest.raises(ValueError, match="and 10 rows"):
        absorption_of_feature(codes, decoder, 0, decoder[0], is_on[:10])
    with pytest.raises(ValueError, match="positive share"):
        absorption_of_feature(codes, decoder, 0, decoder[0], is_on, share=0.0)
    with pytest.raises(ValueError, match="encode the same rows with both"):
        absorption_by_narrower(codes, decoder, Codes.from_dense(torch.ones(2, 1)), decoder[:1])


# Hierarchy.


def test_children_are_found_with_their_parents_and_independent_latents_are_not(
    generator: torch.Generator,
) -> None:
    """1 within 0 and 2 within 1, so 2 within 0; 3 is on in all rows, 4 to 40 are independent,
    and 41 fires three times, by chance or not with latent 0."""
    fires = on(3000, [0.3, 0.3, 0.3, 1.0] + [0.4, 0.02] * 18 + [0.1], generator)
    fires = torch.cat([fires, torch.zeros(3000, 1)], dim=1)
    fires[:, 1] *= fires[:, 0]
    fires[:, 2] *= fires[:, 1]
    fires[fires[:, 0].nonzero()[:3, 0], 41] = 1
    counts = CoActivation(42)
    for part in fires.split(1000):
        counts.update(Codes.from_dense(part))
    found = child_parent_pairs(counts)
    pairs = set(zip(found.children.tolist(), found.parents.tolist(), strict=True))
    assert pairs == {(1, 0), (2, 0), (2, 1)}
    assert (found.parent_given_child == 1).all()
    assert found.n_tested == 42 * 41
    assert (found.p_values.diff() >= 0).all()


def test_a_leaky_child_is_one_as_far_as_the_threshold_allows(generator: torch.Generator) -> None:
    fires = on(4000, [0.2, 0.1], generator)
    leak = on(4000, [0.05], generator)[:, 0]
    fires[:, 1] *= torch.maximum(fires[:, 0], leak)
    counts = CoActivation(2)
    counts.update(Codes.from_dense(fires))
    given = float((fires[:, 0] * fires[:, 1]).sum() / fires[:, 1].sum())
    assert 0.7 < given < 0.95
    assert len(child_parent_pairs(counts).children) == 0
    found = child_parent_pairs(counts, given=0.7)
    assert (found.children.tolist(), found.parents.tolist()) == ([1], [0])
    assert float(found.parent_given_child[0]) == pytest.approx(given)


def test_the_p_value_is_that_of_fishers_exact_test(generator: torch.Generator) -> None:
    """Of 10 rows the parent has 5 and the child 3, all among them: 5C3 / 10C3 = 1/12."""
    fires = torch.zeros(10, 2)
    fires[:5, 0] = 1
    fires[:3, 1] = 1
    counts = CoActivation(2)
    counts.update(Codes.from_dense(fires))
    found = child_parent_pairs(counts, significance=0.5)
    assert float(found.p_values[0]) == pytest.approx(1 / 12)
    assert len(child_parent_pairs(counts, significance=0.1).children) == 0


def test_equal_latents_are_nobodys_parents_and_bad_options_are_refused(
    generator: torch.Generator,
) -> None:
    counts = CoActivation(2)
    counts.update(Codes.from_dense(on(500, [0.2], generator).expand(500, 2).contiguous()))
    assert len(child_parent_pairs(counts).children) == 0
    with pytest.raises(ValueError, match="within one dictionary"):
        child_parent_pairs(CoActivation(2, 2))
    with pytest.raises(ValueError, match="significance in"):
        child_parent_pairs(counts, significance=0.0)
    assert len(child_parent_pairs(CoActivation(3)).children) == 0


# Low activations.


def test_low_activations_tell_a_faithful_latent_from_a_mixed_and_from_a_spurious_one(
    generator: torch.Generator,
) -> None:
    """Latent 0 reads its feature. 1 answers weakly to a second feature that has no latent. 2 fires
    weakly where its feature is off. 3 fires too seldom to tell."""
    n, axes = 8000, torch.eye(24)
    strong = on(n, [0.1, 0.1, 0.1, 0.0005], generator) * (
        0.5 + torch.rand(n, 4, generator=generator)
    )
    spare = (strong[:, 1:2] == 0).float() * on(n, [0.05], generator)
    false = (strong[:, 2:3] == 0).float() * on(n, [0.05], generator)
    x = strong @ axes[:4] + spare @ axes[10:11] + 0.02 * torch.randn(n, 24, generator=generator)
    values = strong.clone()
    values[:, 1:2] += 0.3 * spare * torch.rand(n, 1, generator=generator)
    values[:, 2:3] += 0.3 * false * torch.rand(n, 1, generator=generator)
    codes, decoder = Codes.from_dense(values), axes[:4]
    found = low_activations(codes, decoder, x - values @ decoder)
    assert float(found.agreement[0]) == pytest.approx(1, abs=0.02)
    assert float(found.agreement[1]) < 0.3
    assert found.needed_low[:2].tolist()[0] == pytest.approx(1, abs=0.02)
    assert float(found.needed_low[1]) < 0.2
    assert float(found.needed_low[2]) < 0.2
    torch.testing.assert_close(
        found.needed_high[:3], torch.ones(3, dtype=torch.float64), atol=0.02, rtol=0
    )
    assert all(math.isnan(part[3]) for part in (found.agreement, found.needed_low))


def test_agreement_does_not_fall_with_noise_and_few_rows_as_a_plain_cosine_does(
    generator: torch.Generator,
) -> None:
    """300 latents of one feature each, in noise that leaves means of 30 rows at a cosine of 0.7."""
    n, d, d_sae = 30_000, 64, 300
    values = torch.zeros(n, d_sae)
    latents = torch.arange(d_sae).repeat(n // d_sae)
    values[torch.arange(n), latents] = 1 + 0.2 * torch.rand(n, generator=generator)
    decoder = directions(d_sae, d, generator)
    residual = 0.6 * torch.randn(n, d, generator=generator)
    found = low_activations(Codes.from_dense(values), decoder, residual)
    assert (found.n_low == 30).all()
    height = values.sum(1).reshape(-1, d_sae)
    held = (residual + values @ decoder).reshape(-1, d_sae, d)
    order = height.argsort(0)
    low, high = (
        held.gather(0, rows[:, :, None].expand(-1, -1, d)).mean(0)
        for rows in (order[:30], order[-30:])
    )
    plain = torch.cosine_similarity(low, high)
    assert float(plain.mean()) < 0.75
    assert float(found.agreement.nanmedian()) == pytest.approx(1, abs=0.06)


def test_bands_are_the_lowest_and_the_highest_of_each_latent_and_zeros_are_in_none() -> None:
    """Latent 0 fires at 1 to 10, with the residual telling which rows were taken."""
    n = 40
    values = torch.zeros(n, 2)
    values[:20, 0] = torch.arange(1.0, 21.0)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(3))
    values = values[order]
    codes = Codes.from_rows(torch.arange(2).expand(n, 2), values, 2)
    decoder = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    residual = torch.zeros(n, 2)
    residual[:, 0] = values[:, 0]  # the input asks for twice as much
    residual[values[:, 0] <= 4, 0] = 0
    found = low_activations(codes, decoder, residual, band=0.2, least_rows=1)
    assert found.n_low.tolist() == [4, 0]
    assert float(found.needed_low[0]) == pytest.approx(1)
    assert float(found.needed_high[0]) == pytest.approx(2)


def test_low_activations_refuse_what_does_not_belong_together() -> None:
    codes = Codes.from_dense(torch.ones(3, 4))
    with pytest.raises(ValueError, match="do not go with a decoder of 5"):
        low_activations(codes, torch.ones(5, 2), torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"band must be in \(0, 0.5\]"):
        low_activations(codes, torch.ones(4, 2), torch.ones(3, 2), band=0.6)
