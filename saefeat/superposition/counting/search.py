"""How many atoms a row may pick, and how many there are: chosen by what starts agree on."""

import math
from collections.abc import Callable, Sequence

from saefeat.superposition.counting.agreement import Agreement
from saefeat.superposition.estimators import LEAST_COVERAGE

Compare = Callable[[int, int, int, int], Agreement]
"""What random starts agree on, given atoms, picks, the number of starts and that of rows."""

ROOM = 0.8
"""A width is wide enough if the features fill at most this share of it."""
LAST_WIDTH = 1.5
"""Atoms of the last fits per feature: few, since those to spare are copies, sums and ghosts."""


def choose(
    compare: Compare, picks: Sequence[int], widths: Sequence[int], n_rows: int
) -> tuple[list[Agreement], Agreement]:
    """Try picks at each width, and widths until one has room or agreement falls.

    The width is not chosen by agreement: a narrow dictionary may agree well on the most frequent
    features and know of no others. It is the one at which all starts agree on most features.

    Returns:
        All that was tried, and that with most features.
    """
    probes: list[Agreement] = []
    best_of_widths: list[Agreement] = []
    for d_sae in widths:
        if best_of_widths and not _should_grow(best_of_widths):
            break
        tried: list[Agreement] = []
        for n_picks in picks:
            tried.append(compare(d_sae, n_picks, 2, n_rows))
            best = max(tried, key=_agreement)
            shares = [one.shared_energy / max(best.shared_energy, 1e-9) for one in tried[-2:]]
            if max(shares) < 0.8 or shares[-1] < 0.5:
                break
        probes += tried
        best_of_widths.append(best)
    return probes, max(best_of_widths, key=lambda one: one.n_strict)


def with_room(
    compare: Compare, best: Agreement, most: int, n_seeds: int, n_rows: int
) -> list[Agreement]:
    """Fit with a few atoms more than there are features, and wider until those have room.

    Half as many picks again, with which there are fewer sums to leave out, are tried too. At each
    width the one that agrees better is gone on from; the last two have the answer.
    """
    tried: list[Agreement] = []
    d_sae: int | None = _last_width(best, most)
    while d_sae is not None:
        more = best.picks + math.ceil(best.picks / 2)
        last = [compare(d_sae, n_picks, n_seeds, n_rows) for n_picks in (best.picks, more)]
        tried += last
        best = max(last, key=_agreement)
        d_sae = wider(best, most)
    return tried


def wider(last: Agreement, most: int) -> int | None:
    """Atoms that leave the features room; None where they have it, or are as many as allowed."""
    if last.n_features <= ROOM * last.d_sae:
        return None
    d_sae = _last_width(last, most)
    return d_sae if d_sae > last.d_sae else None


def _last_width(last: Agreement, most: int) -> int:
    return min(most, max(8, 8 * math.ceil(LAST_WIDTH * last.n_features / 8)))


def _agreement(one: Agreement) -> float:
    return one.shared_energy


def _should_grow(widths: list[Agreement]) -> bool:
    last = widths[-1]
    if last.coverage >= LEAST_COVERAGE and last.n_features <= ROOM * last.d_sae:
        return False
    # Two widths more on which starts agree no better, and on no more features: wider ones will not.
    before = widths[-3] if len(widths) > 2 else None
    return (
        before is None
        or last.shared_energy > before.shared_energy + 0.05
        or last.n_strict > 1.2 * before.n_strict + 4
    )
