"""How often features are on, given their directions."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from saefeat.kernels.codes import Codes
from saefeat.kernels.dispatch import choose_kernels

STRONG = 1 / 3
"""A feature is on where its code is at least this share of its usual strength."""
TOLERANCES = (0.05, 0.1, 0.2, 0.3)
"""Shares of a row's length at which to stop picking, to choose from."""
VALUE_BITS = 3
"""Bits that describe the value of a code, beside those that name its feature."""
PRECISION = 1e-3
"""Variance of a coordinate, as a share of the mean one, that is not worth describing."""
ROWS = 10_000
"""Rows on which that is chosen."""


@torch.no_grad()
def code_densities(
    directions: Float[Tensor, "n d_in"],
    offset: Float[Tensor, " d_in"],
    rows: Float[Tensor, "m d_in"],
    picks: int,
) -> Float[Tensor, " n"]:
    """Share of the rows in which each feature is on.

    Rows are coded by matching pursuit with the features alone. When it stops is chosen by the
    description length of the codes and of what they leave: without noise it goes on until little
    is left, with noise it stops where picks cost more bits than they save. Codes below a third of
    their feature's usual strength (the mean square over the mean) are taken for noise.

    Args:
        directions: The features.
        offset: What is taken off rows before.
        rows: Activations.
        picks: Features per row to begin with; more are tried, up to half the width.

    Returns:
        Densities; nothing for no features.
    """
    if len(directions) == 0:
        return torch.zeros(0)
    _, kernels = choose_kernels("auto", torch.device("cpu"))
    atoms = torch.nn.functional.normalize(directions.float(), dim=1)
    centred = rows - offset
    sample = centred[:ROWS]
    gram = atoms @ atoms.T
    most = max(picks, min(len(atoms), rows.shape[1] // 2))

    def code(x: Tensor, n_picks: int, tolerance: float) -> Codes:
        return kernels.matching_pursuit(x, atoms, min(n_picks, len(atoms)), tolerance, gram)

    least, n_picks, tolerance = math.inf, picks, TOLERANCES[0]
    for doublings in range((most // picks).bit_length()):
        before = least
        for one in TOLERANCES:
            bits = _description_bits(code(sample, picks << doublings, one), sample, atoms)
            if bits < least:
                least, n_picks, tolerance = bits, picks << doublings, one
        if least == before:  # more picks describe no better
            break
    codes = code(centred, n_picks, tolerance)
    values, latents = codes.values, codes.latents
    sums = torch.zeros(len(atoms)).index_add_(0, latents, values)
    squares = torch.zeros(len(atoms)).index_add_(0, latents, values.square())
    usual = squares / sums.clamp_min(1e-30)
    on = values >= STRONG * usual[latents]
    return torch.bincount(latents[on], minlength=len(atoms)) / len(rows)


def _description_bits(
    codes: Codes, x: Float[Tensor, "m d_in"], atoms: Float[Tensor, "n d_in"]
) -> float:
    """Bits per row of the codes and, at a fixed precision, of what they leave."""
    rebuilt = torch.zeros_like(x).index_add_(
        0, codes.pattern.rows, codes.values[:, None] * atoms[codes.latents]
    )
    n, d_in = x.shape
    left = float((x - rebuilt).square().sum() / x.square().sum().clamp_min(1e-30))
    per_code = math.log2(len(atoms)) + VALUE_BITS
    n_on = int((codes.values > 0).sum())
    return n_on / n * per_code + d_in / 2 * math.log2(left + PRECISION)
