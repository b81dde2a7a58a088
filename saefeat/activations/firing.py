"""Which of a layer's features are on, row by row, with densities that are exact.

Shape letters: n features, m rows, nnz features that are on in all rows together, b blocks of
correlated features.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saefeat.activations.random_draws import RandomDraws
from saefeat.kernels.codes import SparsityPattern, offsets_of

HIGHEST_RATE = 40.0
"""Rate of a feature that is always on: it is off with probability 4e-18, below what float64
tells from 0."""
ROWS_AT_ONCE = 256
"""Rows whose correlated features are drawn at once, few enough to stay in a processor's cache."""


class Firing:
    """The joint law of n features that are on or off.

    A feature is of one of three kinds: independent of all others, one of a block of correlated
    features, or the child of a parent, which is of one of the first two kinds.
    """

    def __init__(
        self,
        densities: Float[Tensor, " n"],
        parents: Int[Tensor, " n"],
        blocks: Int[Tensor, " n"],
        correlation: float,
        device: torch.device,
    ) -> None:
        """See `SyntheticActivations` for what these are; -1 is no parent, and no block."""
        self.n_features = len(densities)
        densities = densities.double()
        is_alone = (parents < 0) & (blocks < 0)
        self._independent: Callable[[int, RandomDraws], Tensor] = _Independent(
            densities, is_alone.nonzero().squeeze(1), device
        ).keys
        self._correlated = (
            _Correlated(densities, blocks, correlation, device) if (blocks >= 0).any() else None
        )
        self._children = _Children(densities, parents, device) if (parents >= 0).any() else None

    def sample(self, n_rows: int, draws: RandomDraws) -> SparsityPattern:
        """What is on in each of the next rows, features in ascending order within a row."""
        keys = self._independent(n_rows, draws)
        if self._correlated is not None:
            keys = torch.cat([keys, self._correlated.keys(n_rows, draws)])
        if self._children is not None:
            keys = torch.cat([keys, self._children.keys(keys, draws)])
        if self._correlated is not None or self._children is not None:
            keys = keys.sort().values
        rows = keys // self.n_features
        counts = torch.bincount(rows, minlength=n_rows)
        return SparsityPattern(offsets_of(counts), keys - rows * self.n_features, self.n_features)


class _Independent:
    """Features of any densities, drawn at a cost that grows with how many are on.

    Feature i is given the rate -ln(1 - p_i), and is on in a row if a Poisson process of that rate
    has a point in the row's unit of time, which it has with probability p_i. All features of all
    rows, one after the other, make a single process, whose gaps are exponential.
    """

    def __init__(
        self, densities: Float[Tensor, " n"], features: Int[Tensor, " k"], device: torch.device
    ) -> None:
        self._n_features = len(densities)
        self._features = features.to(device)
        rates = -torch.log1p(-densities[features])
        self._ends = rates.clamp(max=HIGHEST_RATE).cumsum(0).to(device)
        self._row_time = float(self._ends[-1]) if len(features) else 0.0

    def keys(self, n_rows: int, draws: RandomDraws) -> Int[Tensor, " nnz"]:
        """row * n + feature for all that are on, ascending."""
        if self._row_time == 0:
            return self._features.new_empty(0)
        duration = n_rows * self._row_time
        # Gaps are whole numbers of ticks so small that float64 still adds them up exactly: sums
        # are then the same in any order of addition, and a GPU's order is not fixed.
        tick = 2.0 ** (math.ceil(math.log2(duration)) - 50)
        gaps = draws.exponential(int(duration + 6 * math.sqrt(duration)) + 16)
        times = (gaps / tick).round_().cumsum(0).mul_(tick)
        while times[-1] < duration:
            more = (draws.exponential(1024) / tick).round_().cumsum(0).mul_(tick)
            times = torch.cat([times, times[-1] + more])
        times = times[: int(torch.searchsorted(times, duration))]
        rows = (times / self._row_time).long().clamp(max=n_rows - 1)
        within = times - rows * self._row_time
        places = torch.searchsorted(self._ends, within, right=True)
        features = self._features[places.clamp_(max=len(self._features) - 1)]
        # A feature with several points in a row is on as with one.
        keys: Tensor = torch.unique_consecutive(rows * self._n_features + features)
        return keys


class _Correlated:
    """Blocks of features whose latent normals correlate (a Gaussian copula).

        z_i = sqrt(rho) g_block + sqrt(1 - rho) e_i,    on if z_i > Phi^-1(1 - p_i)

    Each z_i is standard normal, so that densities are what they are without the correlation
    (Emrich and Piedmonte 1991); a normal number is drawn for every feature and row.
    """

    def __init__(
        self,
        densities: Float[Tensor, " n"],
        blocks: Int[Tensor, " n"],
        correlation: float,
        device: torch.device,
    ) -> None:
        self._n_features = len(densities)
        features = (blocks >= 0).nonzero().squeeze(1)
        self._features = features.to(device)
        self._blocks = blocks[features].to(device)
        self._n_blocks = int(blocks.max()) + 1
        # e_i > (threshold - sqrt(rho) g) / sqrt(1 - rho), the same condition, takes one product
        # for each block instead of one for each feature.
        scale = math.sqrt(1 - correlation)
        thresholds = -torch.special.ndtri(densities[features]) / scale
        self._thresholds = thresholds.float().to(device)
        self._shift = math.sqrt(correlation) / scale

    def keys(self, n_rows: int, draws: RandomDraws) -> Int[Tensor, " nnz"]:
        """row * n + feature for all that are on."""
        found = []
        for first in range(0, n_rows, ROWS_AT_ONCE):
            m = min(ROWS_AT_ONCE, n_rows - first)
            shifts = self._shift * draws.normal(m, self._n_blocks)
            own = draws.normal(m, len(self._features))
            is_on = own > self._thresholds - shifts[:, self._blocks]
            rows, places = is_on.nonzero(as_tuple=True)
            found.append((first + rows) * self._n_features + self._features[places])
        return torch.cat(found)


class _Children:
    """Features that are on only where their parent is, and there with probability p / p_parent."""

    def __init__(
        self, densities: Float[Tensor, " n"], parents: Int[Tensor, " n"], device: torch.device
    ) -> None:
        self._n_features = len(densities)
        children = (parents >= 0).nonzero().squeeze(1)
        by_parent = children[parents[children].argsort(stable=True)]
        n_children = torch.bincount(parents[children], minlength=len(densities))
        self._children = by_parent.to(device)
        self._shares = (densities[by_parent] / densities[parents[by_parent]]).float().to(device)
        self._n_children = n_children.to(device)
        self._first_child = (n_children.cumsum(0) - n_children).to(device)

    def keys(self, keys: Int[Tensor, " nnz"], draws: RandomDraws) -> Int[Tensor, " more"]:
        """row * n + feature for the children that are on, given all that are no children."""
        rows = keys // self._n_features
        features = keys - rows * self._n_features
        counts = self._n_children[features]
        index = torch.repeat_interleave(counts)
        number = torch.arange(len(index), device=keys.device) - (counts.cumsum(0) - counts)[index]
        places = self._first_child[features[index]] + number
        is_on = draws.uniform(len(places)) < self._shares[places]
        return rows[index[is_on]] * self._n_features + self._children[places[is_on]]
