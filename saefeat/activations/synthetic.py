"""Activations whose features are known, to test what finds features.

Shape letters: n features, m rows, d_in width, nnz features that are on in all rows together.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saefeat.activations.feature_laws import (
    MAGNITUDES,
    check_shares,
    draw_blocks,
    draw_magnitudes,
    draw_parents,
    spread_densities,
)
from saefeat.activations.firing import Firing
from saefeat.activations.random_draws import draws_of
from saefeat.activations.sources import Chunk, LeftOut, Order, Progress, fingerprint
from saefeat.activations.stream import ActivationStream
from saefeat.core.devices import resolve_device
from saefeat.kernels.codes import Codes, SparsityPattern
from saefeat.kernels.stock import product

BLOCK_ROWS = 4096
"""Rows that are made at once, from one key."""
EPOCH_ROWS = 2**32
"""Training rows of an epoch; the next epoch has others."""
HELD_OUT_ROWS = 2**20
"""Held-out rows of a stream, unless told otherwise."""

_STRUCTURE = 0
_PARTS = {"train": 1, "held_out": 2, "own": 3}
"""Second number of the keys that random numbers are drawn by."""


class SyntheticActivations:
    """Rows x = sum_i b_i c_i f_i + noise: which features f_i are on, b_i, and how strongly, c_i.

    Every row can be made again by its number: rows come in blocks of 4,096, each drawn from a key
    of its own, so that no choice of batches changes them. A feature is on independently of the
    others, unless one of these is asked for; its density stays what it is asked to be:

    Correlation. Features in blocks, put together at random, are on if latent normals pass a
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
        density: float | Float[Tensor, " n"],
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
        directions: Float[Tensor, "n d_in"] | None = None,
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
        check_shares({"correlation": correlation, "hierarchy": hierarchy})
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
        n_others = n_features - 2 * n_pairs
        if isinstance(density, Tensor):
            if density_distribution != "constant":
                raise ValueError(
                    f"density_distribution={density_distribution!r} spreads a mean, but density "
                    "gives each feature its own. Give one or the other."
                )
            others = density.detach().double().cpu()
            if others.shape != (n_others,):
                raise ValueError(
                    f"density has shape {list(density.shape)}, but {n_others} features are in no "
                    "pair: give a mean, or one number for each of those."
                )
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
        if not ((densities > 0) & (densities <= 1)).all():
            worst = densities[~((densities > 0) & (densities <= 1))][0]
            raise ValueError(
                f"A density of {float(worst):.3g} is no share of rows that a feature can be on "
                "in: density and pair_density must be above 0 and at most 1."
            )
        structure = np.random.default_rng([seed, _STRUCTURE])
        if directions is None:
            drawn = torch.from_numpy(structure.standard_normal((n_features, d_in)))
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
            f"mean density {float(self.densities.mean()):.3g}"
        )

    @property
    def l0(self) -> float:
        """Expected number of features that are on in a row."""
        return float(self.densities.sum())

    @property
    def fingerprint(self) -> str:
        """A hash that differs where any row would."""
        law = (self.magnitude, self.noise, self.correlation, self.seed, self.device.type)
        return fingerprint(
            law, BLOCK_ROWS, self.directions, self.densities, self.parents, self.blocks
        )

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
            ValueError: A number is out of range.
        """
        if part not in _PARTS:
            raise ValueError(f"part={part!r} is unknown; use one of {list(_PARTS)}.")
        if n_rows < 1 or seed < 0 or first_row < 0:
            raise ValueError(
                f"n_rows={n_rows} must be at least 1, seed={seed} and first_row={first_row} at "
                "least 0."
            )
        parts, codes = [], []
        for block, low, high in _blocks_of(first_row, first_row + n_rows):
            x, code = self.block(part, seed, *divmod(block, EPOCH_ROWS // BLOCK_ROWS))
            parts.append(x[low:high])
            codes.append(_rows_of(code, low, high))
        return torch.cat(parts), _joined(codes)

    def block(
        self, part: str, seed: int, epoch: int, number: int
    ) -> tuple[Float[Tensor, "m d_in"], Codes]:
        """A block of rows, and its codes. Held-out rows mind no seed."""
        stream_seed = 0 if part == "held_out" else seed
        draws = draws_of((self.seed, _PARTS[part], stream_seed, epoch, number), self.device)
        pattern = self._firing.sample(BLOCK_ROWS, draws)
        values = draw_magnitudes(self.magnitude, len(pattern.latents), draws)
        x = product(pattern, values, self.directions)
        if self.noise:
            x.add_(draws.normal(BLOCK_ROWS, self.d_in), alpha=self.noise)
        return x, Codes(pattern, values)

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
        held_out = SyntheticSource(self, hook_name, "held_out", 0, held_out_rows)
        return ActivationStream(
            SyntheticSource(self, hook_name, "train", seed, EPOCH_ROWS),
            held_out if held_out_rows else None,
            example={hook_name: self.directions[:1]},
            batch_size=batch_size,
            # Rows are in random order as they are made.
            buffer_rows=batch_size,
            seed=seed,
        )


class SyntheticSource:
    """Rows of `SyntheticActivations`; an item is a block of them."""

    def __init__(
        self, truth: SyntheticActivations, hook_name: str, part: str, seed: int, n_rows: int
    ) -> None:
        self.n_rows = n_rows
        self.n_items = -(-n_rows // BLOCK_ROWS)
        self.chunk_rows = BLOCK_ROWS
        self.has_tokens = False
        self.fingerprint = fingerprint(truth.fingerprint, hook_name, part, seed, n_rows)
        # Numbers, codes and their places: about 60 bytes for each feature that is on.
        self.forward_bytes = int(60 * BLOCK_ROWS * truth.l0) + 4 * BLOCK_ROWS * truth.d_in
        self.buffer_bytes = 4 * BLOCK_ROWS * truth.d_in
        self._truth = truth
        self._hook_name = hook_name
        self._part: str = part
        self._seed = seed
        self._last: tuple[tuple[int, int, int], Tensor] | None = None

    def chunks(
        self, order: Order, progress: Progress, with_tokens: bool = False
    ) -> Iterator[Chunk]:
        for item in order.tolist():
            x, _ = self._truth.block(self._part, self._seed, 0, item)
            x = x[: self.n_rows - item * BLOCK_ROWS]
            progress.left_out.positions_read += len(x)
            progress.n_items += 1
            yield {self._hook_name: x}

    def shuffled_rows(
        self,
        seed: int,
        epoch: int,
        start: int,
        stop: int,
        left_out: LeftOut,
        with_tokens: bool = False,
    ) -> Chunk:
        left_out.positions_read += stop - start
        x = self._truth.directions.new_empty(stop - start, self._truth.d_in)
        at = 0
        for block, low, high in _blocks_of(start, stop):
            x[at : at + high - low] = self._block(seed, epoch, block)[low:high]
            at += high - low
        return {self._hook_name: x}

    def _block(self, seed: int, epoch: int, number: int) -> Float[Tensor, "m d_in"]:
        key, last = (seed, epoch, number), self._last
        if last is not None and last[0] == key:
            return last[1]
        x, _ = self._truth.block(self._part, seed, epoch, number)
        self._last = key, x
        return x


def check_directions(directions: Float[Tensor, "..."], n_features: int, d_in: int) -> None:
    """Refuse what are no unit vectors, one for each feature."""
    if directions.shape != (n_features, d_in):
        raise ValueError(
            f"directions has shape {list(directions.shape)}, not [n_features, d_in] = "
            f"{[n_features, d_in]}."
        )
    error = float((directions.norm(dim=1) - 1).abs().max())
    if not error < 1e-4:
        raise ValueError(
            f"directions must be unit vectors, and the norm of one is {error:.3g} from 1. Divide "
            "each by its norm; how strongly features fire is for `magnitude` to say."
        )


def _blocks_of(start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """The blocks that rows lie in, and of each the first and the end of its rows."""
    for block in range(start // BLOCK_ROWS, -(-stop // BLOCK_ROWS)):
        first = block * BLOCK_ROWS
        yield block, max(start - first, 0), min(stop - first, BLOCK_ROWS)


def _rows_of(codes: Codes, low: int, high: int) -> Codes:
    """The codes of some rows."""
    offsets = codes.offsets[low : high + 1]
    entries = slice(int(offsets[0]), int(offsets[-1]))
    pattern = SparsityPattern(offsets - offsets[0], codes.latents[entries], codes.d_sae)
    return Codes(pattern, codes.values[entries])


def _joined(codes: list[Codes]) -> Codes:
    """The codes of several ranges of rows, one after the other."""
    counts = torch.cat([one.offsets.diff() for one in codes])
    latents = torch.cat([one.latents for one in codes])
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    pattern = SparsityPattern(offsets, latents, codes[0].d_sae)
    return Codes(pattern, torch.cat([one.values for one in codes]))
