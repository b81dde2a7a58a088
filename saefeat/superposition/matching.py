"""Which directions of one dictionary are those of another: the ground on which counts stand.

Directions are compared by signed cosine: codes are not negative, so that a row and its opposite
are two features. A row of norm 0 has no direction and is matched with nothing.

Shape letters used in this file: d width of the activations, n rows, w latents of a dictionary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from saefeat.superposition.assignment import assign_pairs
from saefeat.superposition.directions import Pairs, check_cosine, close_pairs, unit_rows


def assign(
    a: Float[Tensor, "n_a d"], b: Float[Tensor, "n_b _"], *, at_least: float | None = None
) -> Pairs:
    """The one-to-one assignment between the rows of `a` and of `b` with the largest sum of cosines.

    The Hungarian assignment (Kuhn 1955) of unit-normalised rows. As many pairs come back as the
    smaller side has rows other than 0, in the order of `a`.

    Args:
        a: Directions, of any length.
        b: Directions, of any length.
        at_least: Only pairs with at least this cosine, above 0, may be made, and the sum over
            those is maximised. So a pair that counts is never given up for the sake of
            pairs that do not, and no table of all pairs is held.

    Returns:
        `(rows, columns, cosines)`, the cosines in float64.

    Raises:
        ValueError: The widths differ, a number is not finite, or `at_least` is out of range.
    """
    unit_a, unit_b = unit_rows(a), unit_rows(b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"Directions must be of one width, got {a.shape[1]} and {b.shape[1]}. Are both "
            "dictionaries of the same hook?"
        )
    if at_least is not None:
        check_cosine(at_least, "at_least")
        near = close_pairs(unit_a, unit_b, at_least)
        made = assign_pairs(*near, len(a), len(b), exact_up_to=None)
        return made.rows, made.columns, made.weights
    kept_a, kept_b = (unit.any(1).nonzero()[:, 0] for unit in (unit_a, unit_b))
    cosines = (unit_a[kept_a] @ unit_b[kept_b].T).clamp_(-1, 1)
    rows, columns = linear_sum_assignment(cosines.numpy(), maximize=True)
    picked = torch.from_numpy(rows), torch.from_numpy(columns)
    return kept_a[picked[0]], kept_b[picked[1]], cosines[picked]


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedFeatures:
    """Latents of several seeds, put together where they are one direction."""

    groups: tuple[Int[Tensor, " _"], ...]
    """For each seed, the group of each of its latents; -1 for a row of norm 0."""
    found_in: Int[Tensor, " n_groups"]
    """In how many seeds each group was found."""
    directions: Float[Tensor, "n_groups d"]
    """The mean of the unit rows of each group, at length 1."""

    @property
    def n_seeds(self) -> int:
        return len(self.groups)

    @property
    def n_observed(self) -> int:
        """Groups in all, those of one seed included."""
        return len(self.found_in)

    @property
    def n_stable(self) -> int:
        """Groups found in two seeds at least."""
        return int((self.found_in >= 2).sum())


def features_over_seeds(
    decoders: Sequence[Float[Tensor, "_ d"]], *, cosine: float = 0.8
) -> SeedFeatures:
    """Put together the latents of several dictionaries that are one direction.

    Between each two seeds, the assignment of largest summed cosine among the pairs of at least
    `cosine` makes links. Links are then followed from the strongest to the weakest, and each
    joins the groups of its two latents, unless the joined group would hold two latents of one
    seed: such a link is dropped. So a chain in which A of one seed resembles B of another and
    B resembles a second A' leaves B with the nearer of the two. Of equal links, the one between
    earlier seeds and latents is followed first.

    Args:
        decoders: One `[w, d]` matrix of decoder rows for each seed; widths `w` may differ. Set
            the rows of dead latents to 0, since they still have the directions they began with.
        cosine: Least cosine between latents that are one.

    Raises:
        ValueError: There is no dictionary, widths d differ, or `cosine` is out of range.
    """
    check_cosine(cosine, "cosine")
    if not decoders:
        raise ValueError("Features over seeds need the decoder rows of one seed at least, got none")
    units = [unit_rows(decoder) for decoder in decoders]
    starts = np.cumsum([0, *map(len, units)])
    links = [np.empty((0, 3))]
    for s in range(len(units)):
        for t in range(s + 1, len(units)):
            rows, columns, cosines = assign(units[s], units[t], at_least=cosine)
            numbers = (rows.numpy() + starts[s], columns.numpy() + starts[t], cosines.numpy())
            links.append(np.column_stack(numbers))
    left, right, strength = np.concatenate(links).T
    order = np.lexsort((right, left, -strength))
    owner = np.repeat(np.arange(len(units)), np.diff(starts))
    root = _joined(owner, left[order].astype(np.int64), right[order].astype(np.int64))
    gathered = _gathered(units, root)
    return replace(gathered, directions=gathered.directions.to(decoders[0].dtype))


def merge_duplicates(
    rows: Float[Tensor, "n d"],
    cosine: float = 0.9,
    *,
    weights: Float[Tensor, " n"] | None = None,
) -> Int[Tensor, " n"]:
    """Which row stands for each row, once near-duplicates within one dictionary are merged.

    Rows are gone through from the heaviest to the lightest. One that has a cosine of at least
    `cosine` with a row that was kept is a duplicate, and every other one is kept; then each
    duplicate is given to the nearest row that was kept. Only kept rows attract, so that a chain
    of neighbours, each near the next, does not swallow directions that are far from each other,
    as single linkage would.

    Args:
        rows: Directions, of any length.
        cosine: Least cosine between a duplicate and the row that stands for it.
        weights: What decides which of two duplicates is kept, such as the latents' contributions;
            None keeps the earlier.

    Returns:
        The index of the row that stands for each row, its own where it was kept; -1 for rows of
        norm 0. `merged[merged >= 0].unique()` are the kept ones.

    Raises:
        ValueError: A number is not finite, or `cosine` is out of range.
    """
    check_cosine(cosine, "cosine")
    unit = unit_rows(rows)
    left, right, cosines = close_pairs(unit, unit, cosine)
    apart = left != right
    left, right, cosines = left[apart], right[apart], cosines[apart]
    heavy = torch.zeros(len(rows)) if weights is None else weights.detach().cpu()
    if not heavy.isfinite().all():
        raise ValueError("Weights of rows must be finite: they decide which duplicate is kept.")
    rank = torch.empty(len(rows), dtype=torch.int64)
    rank[heavy.argsort(descending=True, stable=True)] = torch.arange(len(rows))
    # Only heavier neighbours can make a row a duplicate.
    heavier = rank[right] < rank[left]
    neighbours: dict[int, list[int]] = {}
    for row, neighbour in zip(left[heavier].tolist(), right[heavier].tolist(), strict=True):
        neighbours.setdefault(row, []).append(neighbour)
    kept = torch.ones(len(rows), dtype=torch.bool)
    for row in sorted(neighbours, key=rank.tolist().__getitem__):
        kept[row] = not any(kept[neighbour] for neighbour in neighbours[row])
    merged = torch.arange(len(rows))
    merged[~unit.any(1)] = -1
    useful = ~kept[left] & kept[right]
    left, right, cosines = left[useful], right[useful], cosines[useful]
    # Nearest last, of equals the heaviest last, since later writes win.
    for entry in np.lexsort((-rank[right].numpy(), cosines.numpy())):
        merged[left[entry]] = right[entry]
    return merged


def near_duplicates(rows: Float[Tensor, "n d"], cosine: float = 0.9) -> Bool[Tensor, " n"]:
    """Which rows have another row at a cosine of at least `cosine`."""
    check_cosine(cosine, "cosine")
    unit = unit_rows(rows)
    left, right, _ = close_pairs(unit, unit, cosine)
    near = torch.zeros(len(rows), dtype=torch.bool)
    near[left[left != right]] = True
    return near


def _joined(
    owner: Int[np.ndarray, " n"], left: Int[np.ndarray, " m"], right: Int[np.ndarray, " m"]
) -> Int[np.ndarray, " n"]:
    """The first latent of the group of each latent, after joining along links in their order."""
    root = list(range(len(owner)))
    members = [[number] for number in range(len(owner))]
    for one, other in zip(left.tolist(), right.tolist(), strict=True):
        first, second = sorted((root[one], root[other]))
        seeds = {owner[number] for number in members[first]}
        if first == second or seeds & {owner[number] for number in members[second]}:
            continue
        for number in members[second]:
            root[number] = first
        members[first] += members[second]
    return np.array(root, dtype=np.int64)


def _gathered(units: Sequence[Float[Tensor, "_ d"]], root: Int[np.ndarray, " n"]) -> SeedFeatures:
    stacked = torch.cat(list(units))
    known = stacked.any(1)
    _, inverse = torch.from_numpy(root)[known].unique(return_inverse=True)
    group = torch.full((len(root),), -1)
    group[known] = inverse
    n_groups = int(inverse.max()) + 1 if len(inverse) else 0
    found_in = torch.bincount(inverse, minlength=n_groups)
    directions = torch.zeros(n_groups, stacked.shape[1], dtype=torch.float64)
    directions.index_add_(0, inverse, stacked[known])
    return SeedFeatures(
        groups=group.split([len(unit) for unit in units]),
        found_in=found_in,
        directions=torch.nn.functional.normalize(directions, dim=1),
    )
