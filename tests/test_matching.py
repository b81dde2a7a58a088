"""Matching of directions: known answers, brute force over small cases, and what must not matter."""

from itertools import permutations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from saefeat.superposition.matching import assign, features_over_seeds, merge_duplicates


def directions(n: int, d: int, generator: torch.Generator) -> Tensor:
    return normalize(torch.randn(n, d, generator=generator), dim=1)


def fan(*degrees: float) -> Tensor:
    """Unit rows in a plane at these angles."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], dim=1)


# One to one.


def test_a_permuted_copy_is_matched_back_whatever_its_rows_lengths(
    generator: torch.Generator,
) -> None:
    a = directions(50, 16, generator)
    order = torch.randperm(50, generator=generator)
    b = a[order] * (0.1 + torch.rand(50, 1, generator=generator))
    for at_least in (None, 0.8):
        rows, columns, cosines = assign(a, b, at_least=at_least)
        assert torch.equal(rows, torch.arange(50))
        assert torch.equal(order[columns], rows)
        torch.testing.assert_close(cosines, torch.ones(50, dtype=torch.float64))


@pytest.mark.parametrize(("n_a", "n_b"), [(4, 4), (3, 6), (6, 3)])
def test_no_assignment_has_a_larger_sum_of_cosines(
    generator: torch.Generator, n_a: int, n_b: int
) -> None:
    a, b = directions(n_a, 3, generator), directions(n_b, 3, generator)
    rows, columns, cosines = assign(a, b)
    assert len(rows.unique()) == len(columns.unique()) == min(n_a, n_b)
    torch.testing.assert_close(cosines.float(), (a[rows] * b[columns]).sum(1))
    table = a @ b.T if n_a <= n_b else b @ a.T
    best = max(
        sum(float(table[i, j]) for i, j in enumerate(order))
        for order in permutations(range(table.shape[1]), len(table))
    )
    assert float(cosines.sum()) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("at_least", [0.3, 0.8, 0.97])
def test_no_matching_of_admitted_pairs_has_a_larger_sum(
    generator: torch.Generator, at_least: float
) -> None:
    a, b = directions(6, 2, generator), directions(6, 2, generator)
    rows, columns, cosines = assign(a, b, at_least=at_least)
    assert (cosines >= at_least).all()
    assert len(rows.unique()) == len(columns.unique()) == len(rows)
    table = a @ b.T
    worth = table.where(table >= at_least, torch.zeros(()))
    best = max(
        sum(float(worth[i, j]) for i, j in enumerate(order)) for order in permutations(range(6))
    )
    assert float(cosines.sum()) == pytest.approx(best, abs=1e-6)


def test_a_pair_that_counts_is_not_given_up_for_pairs_that_do_not() -> None:
    """The full assignment prefers 20 and 60 degrees to 5 and 85, but only 5 is near enough."""
    a, b = fan(0, 40), fan(5, -45)
    rows, columns, _ = assign(a, b)
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [(0, 1), (1, 0)]
    rows, columns, cosines = assign(a, b, at_least=0.99)
    assert (rows.tolist(), columns.tolist()) == ([0], [0])
    assert float(cosines[0]) == pytest.approx(0.99619, abs=1e-5)


def test_rows_of_zero_get_no_partner(generator: torch.Generator) -> None:
    a = directions(5, 8, generator)
    b = a.clone()
    a[1], b[3] = 0, 0
    rows, columns, _ = assign(a, b, at_least=0.9)
    assert rows.tolist() == columns.tolist() == [0, 2, 4]
    rows, columns, _ = assign(a, b)
    assert rows.tolist() == [0, 2, 3, 4]
    assert 3 not in columns.tolist()
    for nothing in (torch.zeros(3, 8), torch.zeros(0, 8)):
        for at_least in (None, 0.9):
            assert [len(part) for part in assign(a, nothing, at_least=at_least)] == [0, 0, 0]


def test_opposite_directions_are_not_matched(generator: torch.Generator) -> None:
    a = directions(20, 64, generator)
    assert len(assign(a, -a, at_least=0.5)[0]) == 0


def test_pairs_do_not_depend_on_the_order_of_rows_nor_on_the_side(
    generator: torch.Generator,
) -> None:
    truth = directions(60, 12, generator)
    a, b = (truth + 0.15 * torch.randn(60, 12, generator=generator) for _ in range(2))
    for at_least in (None, 0.7):
        rows, columns, _ = assign(a, b, at_least=at_least)
        pairs = set(zip(rows.tolist(), columns.tolist(), strict=True))
        order, other = (torch.randperm(60, generator=generator) for _ in range(2))
        rows, columns, _ = assign(a[order], b[other], at_least=at_least)
        assert pairs == set(zip(order[rows].tolist(), other[columns].tolist(), strict=True))
        rows, columns, _ = assign(b, a, at_least=at_least)
        assert pairs == set(zip(columns.tolist(), rows.tolist(), strict=True))


def test_pairs_are_the_same_in_blocks_as_at_once(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = directions(30, 3, generator), directions(25, 3, generator)
    whole = assign(a, b, at_least=0.8)
    monkeypatch.setattr("saefeat.superposition.directions._BLOCK_ELEMENTS", 60)
    for part, expected in zip(assign(a, b, at_least=0.8), whole, strict=True):
        assert torch.equal(part, expected)


def test_what_cannot_be_matched_is_refused(generator: torch.Generator) -> None:
    a = directions(3, 4, generator)
    with pytest.raises(ValueError, match="one width, got 4 and 5"):
        assign(a, directions(3, 5, generator))
    with pytest.raises(ValueError, match="1 of 3 directions are not finite"):
        assign(a, a.index_fill(0, torch.tensor([1]), torch.nan))
    for cosine in (0.0, -0.5, 1.1):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            assign(a, a, at_least=cosine)
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            features_over_seeds([a, a], cosine=cosine)
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            merge_duplicates(a, cosine)
    with pytest.raises(ValueError, match="one seed at least"):
        features_over_seeds([])
    with pytest.raises(ValueError, match="must be finite"):
        merge_duplicates(a, weights=torch.tensor([1.0, torch.inf, 0.0]))


# Over seeds.


def test_features_planted_in_some_of_the_seeds_are_found_in_as_many(
    generator: torch.Generator,
) -> None:
    """Seed 0 holds features 0-29, seed 1 10-49, seed 2 20-39 and a row of zeros, all shuffled."""
    truth = directions(50, 64, generator)
    held = [torch.arange(0, 30), torch.arange(10, 50), torch.arange(20, 40)]
    held = [one[torch.randperm(len(one), generator=generator)] for one in held]
    noise = [0.02 * torch.randn(len(one), 64, generator=generator) for one in held]
    decoders = [3 * (truth[one] + shift) for one, shift in zip(held, noise, strict=True)]
    decoders[2] = torch.cat([decoders[2], torch.zeros(1, 64)])
    features = features_over_seeds(decoders)
    assert features.n_seeds == 3
    assert features.n_observed == 50
    assert features.found_in.bincount().tolist() == [0, 20, 20, 10]
    assert features.n_stable == 30
    assert int(features.groups[2][-1]) == -1
    for one, groups in zip(held, features.groups, strict=True):
        near = (features.directions[groups[: len(one)]] * truth[one]).sum(1)
        assert (near > 0.97).all()
    torch.testing.assert_close(features.directions.norm(dim=1), torch.ones(50))


def test_unrelated_dictionaries_share_nothing(generator: torch.Generator) -> None:
    decoders = [directions(n, 96, generator) for n in (300, 200, 250)]
    features = features_over_seeds(decoders)
    assert features.n_stable == 0
    assert features.n_observed == int((features.found_in == 1).sum()) == 750


def test_a_chain_gives_each_latent_to_the_nearer_and_puts_no_seed_twice_in_a_group() -> None:
    """0 and 40 of seed 0, 15 of seed 1 and 30 of seed 2: 15-30-40-0 is a chain of links."""
    decoders = [fan(0, 40), fan(15), fan(30)]
    features = features_over_seeds(decoders, cosine=0.9)
    # 30-40 is strongest (10 degrees). 0-15 and 15-30 are equal, the earlier seeds first, and
    # after it 15-30 would put both latents of seed 0 together.
    assert [group.tolist() for group in features.groups] == [[0, 1], [0], [1]]
    assert features.found_in.tolist() == [2, 2]
    torch.testing.assert_close(features.directions, fan(7.5, 35))


def test_of_two_latents_of_one_seed_the_nearer_is_taken() -> None:
    features = features_over_seeds([fan(0, 14), fan(6)], cosine=0.95)
    assert [group.tolist() for group in features.groups] == [[0, 1], [0]]


def test_equal_latents_are_paired_off() -> None:
    """Ties: two copies of a direction in each of two seeds make two groups of two."""
    features = features_over_seeds([fan(0, 0, 90), fan(0, 0)])
    assert features.found_in.bincount().tolist() == [0, 1, 2]


def test_no_group_holds_a_seed_twice_and_order_does_not_matter(
    generator: torch.Generator,
) -> None:
    """A crowd in three dimensions, where almost every latent has several neighbours."""
    decoders = [directions(40, 3, generator) for _ in range(4)]
    features = features_over_seeds(decoders, cosine=0.9)
    assert features.n_stable > 20
    for groups in features.groups:
        assert len(groups.unique()) == len(groups)
    members = torch.zeros(features.n_observed, dtype=torch.int64)
    for groups in features.groups:
        members[groups] += 1
    assert torch.equal(members, features.found_in)
    orders = [torch.randperm(40, generator=generator) for _ in range(4)]
    shuffled = [rows[order] for rows, order in zip(decoders, orders, strict=True)]
    again = features_over_seeds(shuffled, cosine=0.9)
    assert partition(again.groups, orders) == partition(
        features.groups, [torch.arange(40) for _ in range(4)]
    )


def partition(groups: tuple[Tensor, ...], orders: list[Tensor]) -> set[frozenset[tuple[int, int]]]:
    """The groups as sets of (seed, latent before shuffling)."""
    sets: dict[int, set[tuple[int, int]]] = {}
    for seed, (one, order) in enumerate(zip(groups, orders, strict=True)):
        for group, latent in zip(one.tolist(), order.tolist(), strict=True):
            sets.setdefault(group, set()).add((seed, latent))
    return {frozenset(one) for one in sets.values()}


def test_one_seed_alone_is_its_own_groups_and_stable_in_nothing(generator: torch.Generator) -> None:
    features = features_over_seeds([directions(7, 5, generator)])
    assert features.groups[0].tolist() == list(range(7))
    assert features.n_stable == 0


# Within one dictionary.


def test_copies_are_merged_into_the_heaviest(generator: torch.Generator) -> None:
    rows = directions(10, 32, generator)
    rows = torch.cat([rows, 2 * rows[:3], torch.zeros(1, 32)])
    first = merge_duplicates(rows)
    assert first.tolist() == [*range(10), 0, 1, 2, -1]
    weights = torch.arange(14.0)
    assert merge_duplicates(rows, weights=weights).tolist() == [10, 11, 12, *range(3, 13), -1]


def test_a_chain_does_not_swallow_directions_that_are_far_apart() -> None:
    """Steps of 18 and 22 degrees, and neighbours within 25: single linkage would leave one row."""
    chain = fan(0, 22, 40, 58, 80)
    merged = merge_duplicates(chain, 0.9063, weights=torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0]))
    assert merged.tolist() == [0, 2, 2, 2, 4]


def test_a_duplicate_goes_to_the_nearest_that_is_kept() -> None:
    rows = fan(0, 30, 16)
    assert merge_duplicates(rows, 0.95, weights=torch.tensor([3.0, 2.0, 1.0])).tolist() == [0, 1, 1]


def test_merging_keeps_rows_apart_and_duplicates_near_in_any_order(
    generator: torch.Generator,
) -> None:
    rows = directions(200, 3, generator)
    weights = torch.rand(200, generator=generator)
    merged = merge_duplicates(rows, 0.9, weights=weights)
    kept = merged.unique()
    among = rows[kept] @ rows[kept].T - 2 * torch.eye(len(kept))
    assert float(among.max()) < 0.9
    assert ((rows * rows[merged]).sum(1) >= 0.9 - 1e-6).all()
    assert torch.equal(merged[kept], kept)
    order = torch.randperm(200, generator=generator)
    again = merge_duplicates(rows[order], 0.9, weights=weights[order])
    assert torch.equal(order[again], merged[order])
