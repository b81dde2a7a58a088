"""Activations in eight bits, with a scale for each row.

Shape letters: n rows, d width of a hook.
"""

import torch
from jaxtyping import Float, Int8
from torch import Tensor

LEVELS = 127


def quantise(rows: Float[Tensor, "n d"]) -> tuple[Int8[Tensor, "n d"], Float[Tensor, " n"]]:
    """Rounds each row to the 255 even steps between minus and plus its largest magnitude.

        scale_i = max_j |x_ij| / 127,    q_ij = round(x_ij / scale_i)

    No entry moves by more than half a step, 1/254 (0.4 %) of the largest magnitude of its row,
    up to the rounding of float32. Rows whose largest magnitude is below 1e-36 become zero.

    Returns:
        q and, in float32, scale.
    """
    rows = rows.float()
    largest = rows.abs().amax(dim=1)
    # Below this a scale would be subnormal, and have too few bits to divide by.
    scales = torch.where(largest < 1e-36, 0.0, largest / LEVELS)
    steps = rows / torch.where(scales == 0, 1.0, scales)[:, None]
    return steps.round_().clamp_(-LEVELS, LEVELS).to(torch.int8), scales


def dequantise(quantised: Int8[Tensor, "n d"], scales: Float[Tensor, " n"]) -> Float[Tensor, "n d"]:
    """The rows again, in float32."""
    return quantised.float().mul_(scales[:, None])
