"""Directions of one dictionary beside those of another: unit rows, and all pairs that are close.

Directions are compared by signed cosine: codes are not negative, so that a row and its opposite
are two features. A row of norm 0 has no direction and is close to nothing.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 24
"""Cosines held at once while pairs are looked for: 64 MB of float32."""

_ROUNDING = 1e-5
"""How far a float32 cosine may be below the threshold to be worked out again in float64."""

Pairs = tuple[Int[Tensor, " n_pairs"], Int[Tensor, " n_pairs"], Float[Tensor, " n_pairs"]]
"""`(rows, columns, cosines)`."""


def unit_rows(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows at length 1 in float64 on the processor; rows of norm 0 stay.

    Raises:
        ValueError: A number is not finite.
    """
    rows = rows.detach().cpu().double()
    if not rows.isfinite().all():
        raise ValueError(
            f"{int((~rows.isfinite()).any(1).sum())} of {len(rows)} directions are not finite. "
            "Did the training of this dictionary diverge?"
        )
    lengths: Tensor = rows.norm(dim=1, keepdim=True)
    lengths[lengths == 0] = 1
    return rows / lengths


def check_cosine(cosine: float, name: str) -> None:
    """ValueError unless the option of that name is above 0 and at most 1."""
    if not 0 < cosine <= 1:
        raise ValueError(
            f"{name} must be above 0 and at most 1, got {cosine}: it is the least cosine between "
            "directions that are taken for one."
        )


def close_pairs(a: Float[Tensor, "n_a d"], b: Float[Tensor, "n_b d"], cosine: float) -> Pairs:
    """All pairs of unit rows with at least this cosine, in the order of `a`, then of `b`."""
    short_a, short_b = a.float(), b.float()
    n_at_once = max(1, _BLOCK_ELEMENTS // max(1, len(b)))
    lefts, rights = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    for start in range(0, len(a), n_at_once):
        near = short_a[start : start + n_at_once] @ short_b.T >= cosine - _ROUNDING
        left, right = near.nonzero(as_tuple=True)
        lefts.append(left + start)
        rights.append(right)
    left, right = torch.cat(lefts), torch.cat(rights)
    n_at_once = max(1, _BLOCK_ELEMENTS // max(1, a.shape[1]))
    parts = zip(left.split(n_at_once), right.split(n_at_once), strict=True)
    exact = [torch.einsum("nd,nd->n", a[one], b[other]) for one, other in parts]
    cosines = torch.cat([torch.empty(0, dtype=torch.float64), *exact]).clamp_(-1, 1)
    admitted = cosines >= cosine
    return left[admitted], right[admitted], cosines[admitted]
