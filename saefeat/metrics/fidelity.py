"""How much of the activations a reconstruction keeps."""

import torch
from jaxtyping import Float
from torch import Tensor

from saefeat.core.distributed import Ranks


def fraction_variance_unexplained(
    target: Float[Tensor, "n d"], recon: Float[Tensor, "n d"]
) -> Float[Tensor, ""]:
    """Squared error of `recon`, as a fraction of the variance of `target`.

        FVU = sum_i |target_i - recon_i|^2 / sum_i |target_i - mean(target)|^2

    No unit. 0 is perfect, 1 is what the mean vector scores; a bad dictionary passes 1.

    Raises:
        ValueError: `target` holds fewer than 2 rows, or does not vary, or the widths differ.
    """
    sums = FidelitySums()
    sums.update(target, recon)
    return torch.tensor(sums.fvu, dtype=target.dtype, device=target.device)


def normalized_mse(target: Float[Tensor, "n d"], recon: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Mean over rows of the squared error as a share of the row's squared norm.

        NMSE = mean_i |target_i - recon_i|^2 / |target_i|^2

    Uncentred, after Gao et al. 2024 (arXiv:2406.04093). Rows of norm 0 are left out.

    Raises:
        ValueError: Every row is 0, or the widths differ.
    """
    sums = FidelitySums()
    sums.update(target, recon)
    return torch.tensor(sums.normalized_mse, dtype=target.dtype, device=target.device)


class FidelitySums:
    """Adds up error and variance over batches, in float64.

    The variance is merged batch by batch (Chan, Golub and LeVeque 1983), since a sum of squares
    minus a squared mean loses every digit where the mean is large, as in a residual stream.
    """

    def __init__(self) -> None:
        self.n_rows = 0
        self.squared_error = 0.0
        self.squared_deviation = 0.0
        self.relative_error = 0.0
        self.n_relative = 0
        self._mean: Float[Tensor, " d"] | None = None

    def update(self, target: Float[Tensor, "..."], recon: Float[Tensor, "..."]) -> None:
        """Take in a batch of `[n, d]` rows and what became of them."""
        if target.shape != recon.shape or target.ndim != 2:
            raise ValueError(
                f"Target and reconstruction must be matrices of one shape, got "
                f"{list(target.shape)} and {list(recon.shape)}. Are they of the same hook?"
            )
        if len(target) == 0:
            return
        target, recon = target.detach().double(), recon.detach().double()
        error = (target - recon).square().sum(1)
        norm = target.square().sum(1)
        self.squared_error += float(error.sum())
        self.relative_error += float((error[norm > 0] / norm[norm > 0]).sum())
        self.n_relative += int((norm > 0).sum())
        mean, n = target.mean(0), len(target)
        if self._mean is None:
            self._mean = torch.zeros_like(mean)
        shift = mean - self._mean
        merged = self.n_rows + n
        self.squared_deviation += float((target - mean).square().sum())
        self.squared_deviation += float(shift.square().sum()) * self.n_rows * n / merged
        self._mean = self._mean + shift * n / merged
        self.n_rows = merged

    def add_up(self, ranks: Ranks, d: int) -> None:
        """Take in what the other processes have summed of theirs, in rows of width d."""
        if ranks.size == 1:
            return
        mean = torch.zeros(d, dtype=torch.float64) if self._mean is None else self._mean
        summed = ranks.sum(torch.cat([self.n_rows * mean.cpu(), self._sums()]))
        n_rows = int(summed[d])
        whole_mean = summed[:d] / max(1, n_rows)
        between = self.n_rows * (mean.cpu() - whole_mean).square().sum()
        self.squared_deviation = float(summed[d + 1] + ranks.sum(between))
        self.squared_error, self.relative_error = float(summed[d + 2]), float(summed[d + 3])
        self.n_relative, self.n_rows = int(summed[d + 4]), n_rows
        self._mean = whole_mean

    def _sums(self) -> Float[Tensor, "5"]:
        sums = (self.n_rows, self.squared_deviation, self.squared_error, self.relative_error)
        return torch.tensor([*sums, self.n_relative], dtype=torch.float64)

    @property
    def total_variance(self) -> float:
        """Sum over rows of the squared distance to the mean; what shares of variance divide by."""
        if self.n_rows < 2:
            raise ValueError(
                f"FVU is undefined: {self.n_rows} rows have no variance. Give at least 2."
            )
        # Rounding in float64 leaves equal rows far less than this.
        scale = self.n_rows * float(torch.as_tensor(self._mean).square().sum())
        if self.squared_deviation <= 1e-24 * scale or self.squared_deviation == 0:
            raise ValueError(
                f"FVU is undefined: all {self.n_rows} rows of `target` are equal. "
                "Check that the hook point is not a constant (a bias, a masked position)."
            )
        return self.squared_deviation

    @property
    def fvu(self) -> float:
        """See `fraction_variance_unexplained`."""
        return self.squared_error / self.total_variance

    @property
    def normalized_mse(self) -> float:
        """See the function `normalized_mse`."""
        if self.n_relative == 0:
            raise ValueError("The normalised MSE is undefined: every row of `target` is 0.")
        return self.relative_error / self.n_relative
