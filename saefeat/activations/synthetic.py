"""Activations whose features are known, to test what finds features.

Shape letters: n features, m rows, d_in width.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saefeat.activations.feature_laws import (
    MAGNITUDES,
    check_directions,
    draw_blocks,
    draw_magnitudes,
    draw_parents,
    given_densities,
    spread_densities,
)
from saefeat.activations.firing import ROWS_AT_ONCE, Firing
from saefeat.activations.random_draws import draws_of
from saefeat.activations.sources import fingerprint
from saefeat.activations.stream import ActivationStream
from saefeat.activations.synthetic_source import (
    BLOCK_ROWS,
    EPOCH_ROWS,
    SyntheticSource,
    blocks_of,
)
from saefeat.core.devices import resolve_device
from saefeat.kernels.codes import Codes, SparsityPattern, offsets_of
from saefeat.kernels.stock import product

HELD_OUT_ROWS = 2**20
"""Held-out rows of a stream, unless told otherwise."""
STRUCTURE = 0
"""Second number of the seed that directions, parents and blocks are drawn from."""
PARTS = {"train": 1, "held_out": 2, "own": 3}
"""And of the keys that rows are drawn from."""


class SyntheticActivations:
    """Rows x = sum_i b_i c_i f_i + noise: which features f_i are on, b_i, and how strongly, c_i.

    Every row can be made again by its number: rows come in blocks of 4,096, each drawn from a key
    of its own, so that no choice of batches changes them. Each feature is on independently of the
    others, unless one of the following is asked for, and always as often as it is asked to be:

    Correlation. Features in blocks, put together at random, are on where latent normals pass a
    threshold, which correlate within the block (a Gaussian copula).

    Hierarchy. The least dense features are children. A child is on only where its parent is on,
    and there with probability p_child / p_parent. Each parent is drawn among the others that are
    at least twice as dense. Dictionaries absorb such features (Chanin et al. 2024,
    arXiv:2409.14507).

    Pairs. Two frequent features A and B that are independent of each other and of all else, of
    which a dictionary may learn "A and B", "A without B" and "B without A", since that lowers L0.
    The pairs are the last features.
    """

    def __init__(
        self,
        *,
        n_features: int,
        d_in: int,
        density: float | Float[Tensor, " _"],
        density_distribution: str = "constant",
        zipf_exponent: float = 0.7,
        density_ratio: float = 100.0,
        magnitude: str = "uniform",
        noise: float = 0.0,
        correlation: float = 0.0,
        correlation_block_size: int = 8,
        hierarchy: float = 0.0,
        n_pairs: int = 0,
        pair_density: float = 0.25,
        directions: Float[Tensor, "..."] | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        """
        Args:
            n_features: Features, pairs included.
            d_in: Width of a row.
            density: P(on): the mean over all features that are in no pair, or that of each.
            density_distribution: How a mean is spread over features, in descending order:
                "constant", "zipf" or "log_uniform".
            zipf_exponent: p_i is in proportion to (i + 1)^-zipf_exponent.
            density_ratio: Largest density over smallest, of the log-uniform distribution.
            magnitude: Law of c_i, of mean 1: "constant", "uniform" on [0.5, 1.5), "half_normal",
                or "log_normal" with a logarithm of standard deviation 0.5.
            noise: Standard deviation of the normal noise on each coordinate.
            correlation: Of the latent normals of two features of a block.
            correlation_block_size: Features in a block.
            hierarchy: Share of the features that are children; the others alone are in blocks.
            n_pairs: Independent pairs.
            pair_density: P(on) of each feature of a pair.
            directions: The unit vectors f_i; None draws them at random.
            seed: Decides directions, parents, blocks and, with its own seed, every stream.
            device: Where rows are made. The same seed gives other rows on a GPU.

        Raises:
            ValueError: An option is out of range, or densities and hierarchy do not fit.
        """
        for name, value, least in (
            ("n_features", n_features, 1),
            ("d_in", d_in, 1),
            ("correlation_block_size", correlation_block_size, 2),
            ("n_pairs", n_pairs, 0),
            ("seed", seed, 0),
            ("noise", noise, 0),
            ("zipf_exponent", zipf_exponent, 0),
            ("density_ratio", density_ratio, 1),
        ):
            if not least <= value < float("inf"):
                raise ValueError(f"{name}={value} must be finite and at least {least}.")
        for name, share in (("correlation", correlation), ("hierarchy", hierarchy)):
            if not 0 <= share < 1:
                raise ValueError(f"{name}={share} must be at least 0 and below 1.")
        if magnitude not in MAGNITUDES:
            raise ValueError(f"magnitude={magnitude!r} is unknown; use one of {list(MAGNITUDES)}.")
        if 2 * n_pairs > n_features:
            raise ValueError(f"{n_pairs} pairs need {2 * n_pairs} features, of {n_features}.")
        self.n_features = n_features
        self.d_in = d_in
        self.magnitude = magnitude
        self.noise = float(noise)
        self.correlation = correlation
        self.seed = seed
        self.device = resolve_device(device)
        if self.device.type == "mps":
            raise ValueError("device='mps' lacks float64, in which features are drawn. Use 'cpu'.")
        n_others = n_features - 2 * n_pairs
        if isinstance(density, Tensor):
            others = given_densities(density, n_others, density_distribution)
        else:
            others = spread_densities(
                n_others,
                density,
                density_distribution,
                zipf_exponent=zipf_exponent,
                density_ratio=density_ratio,
            )
        paired = torch.full((2 * n_pairs,), pair_density, dtype=torch.float64)
        densities = torch.cat([others, paired])
        is_share = (densities > 0) & (densities <= 1)
        if not is_share.all():
            raise ValueError(
                f"{float(densities[~is_share][0]):.3g} is no density that a feature can have: "
                "density and pair_density must be above 0 and at most 1."
            )
        structure = np.random.default_rng([seed, STRUCTURE])
        drawn = torch.from_numpy(structure.standard_normal((n_features, d_in)))
        if directions is None:
            directions = (drawn / drawn.norm(dim=1, keepdim=True)).float()
        else:
            directions = directions.detach().float().cpu()
            check_directions(directions, n_features, d_in)
        parents = torch.full((n_features,), -1)
        parents[:n_others] = draw_parents(others, hierarchy, structure)
        blocks = torch.full((n_features,), -1)
        if correlation > 0:
            roots = (parents[:n_others] < 0).nonzero().squeeze(1)
            blocks = draw_blocks(roots, n_features, correlation_block_size, structure)
        self.directions: Float[Tensor, "n d_in"] = directions.to(self.device)
        """Unit vectors."""
        self.densities: Float[Tensor, " n"] = densities.to(self.device)
        """P(on) of each feature, in float64."""
        self.parents: Int[Tensor, " n"] = parents.to(self.device)
        """The feature that has to be on where this one is; -1 for none."""
        self.blocks: Int[Tensor, " n"] = blocks.to(self.device)
        """Features of one number correlate; -1 for none."""
        self.pairs: Int[Tensor, "n_pairs 2"] = torch.arange(
            n_others, n_features, device=self.device
        ).reshape(n_pairs, 2)
        """The features A and B of each pair."""
        self._firing = Firing(densities, parents, blocks, correlation, self.device)

    def __repr__(self) -> str:
        return (
            f"SyntheticActivations of {self.n_features} features in {self.d_in} dimensions, "
            f"{self.l0:.3g} of them on in a row"
        )

    @property
    def l0(self) -> float:
        """Expected number of features that are on in a row."""
        return float(self.densities.sum())

    @property
    def fingerprint(self) -> str:
        """A hash that differs where any row would."""
        law = (self.magnitude, self.noise, self.correlation, self.seed, self.device.type)
        return fingerprint(law, self.directions, self.densities, self.parents, self.blocks)

    @property
    def forward_bytes(self) -> int:
        """About the memory that making a block takes for a moment, besides the block itself."""
        # For each feature that is on, eight numbers of 64 bits, gaps and places; for each that
        # correlates, what decides whether it is on, in a part of the rows at a time.
        n_correlated = int((self.blocks >= 0).sum())
        noise = 4 * BLOCK_ROWS * self.d_in if self.noise else 0
        return int(64 * BLOCK_ROWS * self.l0) + 16 * ROWS_AT_ONCE * n_correlated + noise

    def sample(
        self, n_rows: int, *, seed: int = 0, part: str = "own", first_row: int = 0
    ) -> tuple[Float[Tensor, "m d_in"], Codes]:
        """Rows, and the codes b_i c_i that made them.

        Args:
            n_rows: Rows to give.
            seed: Other seeds give other rows.
            part: "own" are rows that no stream gives; "train" are those of a stream of this seed,
                in its order, and "held_out" those that every stream holds out.
            first_row: The number of the first.

        Raises:
            ValueError: A number is out of range, or there is no such part.
        """
        if part not in PARTS:
            raise ValueError(f"part={part!r} is unknown; use one of {list(PARTS)}.")
        if n_rows < 1 or seed < 0 or first_row < 0:
            raise ValueError(
                f"n_rows={n_rows} must be at least 1, seed={seed} and first_row={first_row} at "
                "least 0."
            )
        rows, counts, latents, values = [], [], [], []
        for number, low, high in blocks_of(first_row, first_row + n_rows):
            epoch, number = divmod(number, EPOCH_ROWS // BLOCK_ROWS)
            x, codes = self._block(part, seed, epoch, number)
            offsets = codes.offsets[low : high + 1]
            entries = slice(int(offsets[0]), int(offsets[-1]))
            rows.append(x[low:high])
            counts.append(offsets.diff())
            latents.append(codes.latents[entries])
            values.append(codes.values[entries])
        pattern = SparsityPattern(
            offsets_of(torch.cat(counts)), torch.cat(latents), self.n_features
        )
        return torch.cat(rows), Codes(pattern, torch.cat(values))

    def rows(self, part: str, seed: int, epoch: int, number: int) -> Float[Tensor, "m d_in"]:
        """The rows of a block, which streams are made of; see `sample` for rows and codes."""
        return self._block(part, seed, epoch, number)[0]

    def stream(
        self,
        *,
        batch_size: int = 4096,
        hook_name: str = "synthetic",
        held_out_rows: int = HELD_OUT_ROWS,
        seed: int = 0,
    ) -> ActivationStream:
        """Endless rows to train on, none of them twice, and others to measure on.

        Args:
            batch_size: Rows in a batch.
            hook_name: What the rows are called.
            held_out_rows: Rows that training never gives, the same for every seed.
            seed: Decides the rows to train on.

        Raises:
            ValueError: A number is out of range.
        """
        if held_out_rows < 0:
            raise ValueError(f"held_out_rows={held_out_rows} must be at least 0.")
        held_out = SyntheticSource(self, hook_name, "held_out", seed=0, n_rows=held_out_rows)
        return ActivationStream(
            SyntheticSource(self, hook_name, "train", seed=seed, n_rows=EPOCH_ROWS),
            held_out if held_out_rows else None,
            example={hook_name: self.directions[:1]},
            batch_size=batch_size,
            # Rows are in random order as they are made.
            buffer_rows=batch_size,
            seed=seed,
        )

    def _block(
        self, part: str, seed: int, epoch: int, number: int
    ) -> tuple[Float[Tensor, "m d_in"], Codes]:
        # Held-out rows are the same for every seed.
        stream_seed = 0 if part == "held_out" else seed
        draws = draws_of((self.seed, PARTS[part], stream_seed, epoch, number), self.device)
        pattern = self._firing.sample(BLOCK_ROWS, draws)
        values = draw_magnitudes(self.magnitude, len(pattern.latents), draws)
        x = product(pattern, values, self.directions)
        if self.noise:
            x.add_(draws.normal(BLOCK_ROWS, self.d_in), alpha=self.noise)
        return x, Codes(pattern, values)
