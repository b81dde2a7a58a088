"""The plain reference: every kernel in the fewest torch operators, on any device and dtype.

It gathers one weight row for each stored entry, so it needs `nnz * d` numbers of memory. Other
backends are tested against it. A codes matrix C and the three products below are all that the
forward and backward pass of a sparse dictionary need.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saefeat.kernels.codes import Codes, SparsityPattern


def top_k(scores: Float[Tensor, "n d_sae"], k: int) -> Int[Tensor, "n k"]:
    """The k largest entries of each row, as indices in no fixed order."""
    return scores.topk(k, dim=1, sorted=False).indices


def batch_top_k(
    scores: Float[Tensor, "n d_sae"], n_kept: int
) -> tuple[SparsityPattern, Float[Tensor, ""]]:
    """The `n_kept` largest positive entries of a matrix, and the least of them.

    All entries that equal the least one are kept, since nothing tells them apart. Where fewer
    entries are positive, those are kept.
    """
    least = scores.flatten().topk(n_kept).values[-1].clamp_min(torch.finfo(scores.dtype).tiny)
    mask = scores >= least
    kept_least = scores[mask].min() if mask.any() else least
    return SparsityPattern.from_mask(mask), kept_least.float()


def above(scores: Float[Tensor, "n d_sae"], floor: Float[Tensor, " d_sae"]) -> SparsityPattern:
    """The entries above the floor of their latent, which is cast to the dtype of `scores`."""
    return SparsityPattern.from_mask(scores > floor.to(scores.dtype))


def sampled_product(
    pattern: SparsityPattern, left: Float[Tensor, "n d"], right: Float[Tensor, "d_sae d"]
) -> Float[Tensor, " nnz"]:
    """The stored entries of `left @ right.T`, without the others."""
    return (left[pattern.rows] * right[pattern.latents]).sum(dim=1)


def product(
    pattern: SparsityPattern, values: Float[Tensor, " nnz"], weight: Float[Tensor, "d_sae d"]
) -> Float[Tensor, "n d"]:
    """`C @ weight`: each row adds up the weight rows of its latents."""
    out = weight.new_zeros(pattern.n_rows, weight.shape[1])
    return out.index_add_(0, pattern.rows, values[:, None] * weight[pattern.latents])


def transposed_product(
    pattern: SparsityPattern, values: Float[Tensor, " nnz"], rows: Float[Tensor, "n d"]
) -> Float[Tensor, "d_sae d"]:
    """`C.T @ rows`: each latent adds up the rows that it is on in."""
    out = rows.new_zeros(pattern.d_sae, rows.shape[1])
    return out.index_add_(0, pattern.latents, values[:, None] * rows[pattern.rows])


def latent_sums(pattern: SparsityPattern, values: Float[Tensor, " nnz"]) -> Float[Tensor, " d_sae"]:
    """The column sums of C."""
    return values.new_zeros(pattern.d_sae).index_add_(0, pattern.latents, values)


def matching_pursuit(
    x: Float[Tensor, "n d"],
    atoms: Float[Tensor, "d_sae d"],
    k: int,
    tolerance: float = 0.0,
    gram: Float[Tensor, "d_sae d_sae"] | None = None,
) -> Codes:
    """Codes by non-negative orthogonal matching pursuit over atoms of length 1.

    A row picks the atom that correlates most with its residual and refits all it has picked by
    least squares, until it has `k`, nothing correlates, or the residual is shorter than
    `tolerance` of the row, or than rounding. Picks that end with a negative code are dropped and
    the rest refitted, until none is negative. `gram`, `atoms @ atoms.T`, may be given where it is
    at hand; this reference does without.
    """
    tolerance = max(tolerance, (10 * torch.finfo(x.dtype).eps) ** 0.5)
    dense = x.new_zeros(len(x), len(atoms))
    for row, target in zip(dense, x, strict=True):
        picked: list[int] = []
        values = residual = target
        while len(picked) < k and residual.norm() > tolerance * target.norm():
            scores = atoms @ residual
            scores[picked] = -torch.inf
            best = int(scores.argmax())
            chosen = atoms[[*picked, best]].T
            # Nothing points along the residual, or all that does was picked already.
            if scores[best] <= 0 or torch.linalg.svdvals(chosen)[-1] < 1e-2:
                break
            picked.append(best)
            values = torch.linalg.lstsq(chosen, target[:, None]).solution.squeeze(1)
            residual = target - chosen @ values
        while picked and (values < 0).any():
            picked = [latent for latent, value in zip(picked, values, strict=True) if value > 0]
            chosen = atoms[picked].T
            values = torch.linalg.lstsq(chosen, target[:, None]).solution.squeeze(1)
        row[picked] = values[: len(picked)]
    return Codes.from_dense(dense)
