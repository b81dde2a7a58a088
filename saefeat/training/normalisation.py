"""What a trainer has to know of a hook's activations before it can learn from them."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


class ActivationScale:
    """The factor that brings the mean norm of a hook's activations to sqrt(d_in).

    One learning rate and one sparsity penalty then mean the same at every hook. The mean runs
    over all rows seen so far, so the factor settles as training goes on and no pass over the
    data has to come first.
    """

    def __init__(self, d_in: int, device: torch.device | None = None) -> None:
        self.d_in = d_in
        self.norm_sum = torch.zeros((), dtype=torch.float64, device=device)
        """Of all rows so far; not finite if any entry was not."""
        self.n_rows = 0

    def update(self, x: Float[Tensor, "n d_in"]) -> None:
        """Take in a batch."""
        self.add(summed_norm(x), len(x))

    def add(self, norm_sum: Float[Tensor, ""], n_rows: int) -> None:
        """Take in a batch of which the `summed_norm` is known."""
        self.norm_sum += norm_sum
        self.n_rows += n_rows

    @property
    def factor(self) -> Float[Tensor, ""]:
        """sqrt(d_in) over the mean norm; it stays on the device."""
        return math.sqrt(self.d_in) * self.n_rows / self.norm_sum


def summed_norm(x: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """The sum of the lengths of all rows, in float64."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=1)
    return norms.sum(dtype=torch.float64)


def geometric_median(
    points: Float[Tensor, "n d"], *, n_iterations: int = 100, tolerance: float = 1e-6
) -> Float[Tensor, " d"]:
    """The point with the least summed distance to all rows, by Weiszfeld's iteration.

    Unlike the mean it is not moved by a few rows of huge norm; Gao et al. 2024
    (arXiv:2406.04093) start the decoder bias there. Iteration stops once a step is shorter
    than `tolerance` of the mean distance.
    """
    centre = points.mean(0)
    for _ in range(n_iterations):
        distances = torch.linalg.vector_norm(points - centre, dim=1)
        # A row that coincides with the centre would weigh infinitely.
        weights = 1 / distances.clamp_min(1e-8 * distances.mean() + 1e-30)
        moved = (weights @ points) / weights.sum()
        step = torch.linalg.vector_norm(moved - centre)
        centre = moved
        if step <= tolerance * distances.mean():
            break
    return centre
