"""Non-negative orthogonal matching pursuit from inner products of atoms, batched over rows.

`eager.matching_pursuit` says in the fewest lines what is computed. Here the residual is never
formed: correlations with all atoms are updated from the Gram matrix, each new pick being made
orthogonal to those before it (Batch-OMP: Rubinstein, Zibulevsky and Elad 2008, with a progressive
Cholesky factor). For T picks that is the arithmetic of `T * T / (2 d)` encoder products.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saefeat.kernels.codes import Codes, SparsityPattern

WORKING_SET = 1 << 22
"""Numbers in the largest temporary: rows at once x picks x atoms."""
DEPENDENT = 1e-4
"""Squared length below which what is new in an atom, beside those picked, counts as rounding."""


def matching_pursuit(
    x: Float[Tensor, "n d"],
    atoms: Float[Tensor, "d_sae d"],
    k: int,
    tolerance: float = 0.0,
    gram: Float[Tensor, "d_sae d_sae"] | None = None,
) -> Codes:
    """See `eager.matching_pursuit`. This runs on any device."""
    gram = atoms @ atoms.T if gram is None else gram
    rows_at_once = max(1, WORKING_SET // (k * len(atoms)))
    share = squared_tolerance(tolerance, x.dtype)
    parts = [_pursue(part @ atoms.T, part, gram, k, share) for part in x.split(rows_at_once)]
    picked = torch.cat([picked for picked, _ in parts])
    values = torch.cat([values for _, values in parts])
    return as_codes(picked, values, len(atoms))


def squared_tolerance(tolerance: float, dtype: torch.dtype) -> float:
    """The share of a row's squared length at which to stop; what rounding leaves, at least."""
    return max(tolerance * tolerance, 10 * torch.finfo(dtype).eps)


def as_codes(picked: Int[Tensor, "n k"], values: Float[Tensor, "n k"], d_sae: int) -> Codes:
    """Codes of the picks whose value is above 0."""
    kept, values = (values > 0).flatten(), values.flatten()
    pattern = SparsityPattern.from_top_k(picked, d_sae)
    if kept.all():
        return Codes(pattern, values)
    return Codes(pattern.where(kept), values[kept])


def _pursue(
    scores: Float[Tensor, "n d_sae"],
    x: Float[Tensor, "n d"],
    gram: Float[Tensor, "d_sae d_sae"],
    k: int,
    share: float,
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """The picks of each row in their order, and their codes; 0 for picks never made."""
    n, d_sae = scores.shape
    rows = torch.arange(n, device=x.device)
    picked = torch.zeros(n, k, dtype=torch.int64, device=x.device)
    # x ~ sum_t weight_t direction_t, directions being what is new in each pick, at length 1.
    weights = x.new_zeros(n, k)
    factor = torch.eye(k, dtype=x.dtype, device=x.device).repeat(n, 1, 1)
    along = x.new_empty(n, k - 1, d_sae)  # inner products of directions and atoms
    fresh = x.new_ones(n, d_sae)  # squared length of what is new in each atom
    left = x.square().sum(1)
    enough = share * left
    for t in range(k):
        best, chosen = scores.max(1)
        active = (best > 0) & (left > enough)
        length = fresh[rows, chosen].clamp_min(DEPENDENT).sqrt()
        before = along[rows, :t, chosen]
        weight = torch.where(active, best / length, 0.0)
        picked[:, t] = chosen
        weights[:, t] = weight
        factor[:, t, :t] = before
        factor[:, t, t] = length
        if t + 1 == k:
            break
        direction = gram[chosen] - torch.bmm(before[:, None], along[:, :t]).squeeze(1)
        direction /= length[:, None]
        along[:, t] = direction
        fresh -= direction.square()
        scores -= weight[:, None] * direction
        # A row that has stopped goes on with weight 0, which changes none of its codes.
        scores.masked_fill_(fresh < DEPENDENT, -torch.inf)
        scores[rows, chosen] = -torch.inf
        left = left - weight.square()
    values = torch.linalg.solve_triangular(
        factor.transpose(1, 2), weights[:, :, None], upper=True
    ).squeeze(2)
    return picked, _without_negative(values, factor, weights)


def _without_negative(
    values: Float[Tensor, "n k"], factor: Float[Tensor, "n k k"], weights: Float[Tensor, "n k"]
) -> Float[Tensor, "n k"]:
    """Codes in which picks that came out negative are dropped and the others refitted."""
    rows = (values < 0).any(1).nonzero().squeeze(1)
    kept = values[rows] != 0
    while len(rows):
        kept &= values[rows] > 0
        lower = factor[rows]
        # Dropped picks become their own equation, 1 * 0 = 0.
        both = kept[:, :, None] & kept[:, None, :]
        products = torch.where(both, lower @ lower.transpose(1, 2), 0.0)
        products.diagonal(dim1=1, dim2=2).masked_fill_(~kept, 1.0)
        inner = torch.where(kept, torch.bmm(lower, weights[rows, :, None]).squeeze(2), 0.0)
        values[rows] = torch.linalg.solve(products, inner)
        still = (values[rows] < 0).any(1)
        rows, kept = rows[still], kept[still]
    return values
