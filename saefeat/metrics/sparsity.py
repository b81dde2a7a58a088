"""How many latents are on, how often each one is, and how many that amounts to."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saefeat.core.distributed import Ranks
from saefeat.kernels.codes import Codes

ULTRALOW_DENSITY = 1e-5
"""Below this a latent belongs to the ultralow cluster, whose features Bricken et al. 2023
("Towards Monosemanticity", feature density histograms) found to mean nothing."""


def l0(codes: Codes) -> Float[Tensor, ""]:
    """Mean number of latents above zero in a row.

    Raises:
        ValueError: There are no rows.
    """
    _check_rows(codes.n_rows, "L0")
    return (codes.values > 0).sum() / codes.n_rows


def feature_density(codes: Codes) -> Float[Tensor, " d_sae"]:
    """Share of rows in which each latent is above zero.

    Raises:
        ValueError: There are no rows.
    """
    _check_rows(codes.n_rows, "Density")
    return codes.firing_counts() / codes.n_rows


def features_per_neuron(n_features: float, n_neurons: int) -> float:
    """Degree of superposition: features of a layer over neurons of that layer.

    Neurons are the coordinates of the activations: d_model in the residual stream, d_mlp in
    the hidden layer of an MLP.

    Raises:
        ValueError: `n_neurons` is below 1, or `n_features` below 0.
    """
    if n_neurons < 1 or n_features < 0:
        raise ValueError(
            "Features per neuron needs n_neurons >= 1 and n_features >= 0, got "
            f"n_neurons={n_neurons} and n_features={n_features}."
        )
    return n_features / n_neurons


def effective_features(contributions: Float[Tensor, " d_sae"]) -> float:
    """The number of equally strong latents that would be as mixed as these.

        F = exp(-sum_i p_i ln p_i),    p_i = c_i / sum_j c_j,    c_i = sum over tokens of f_i |d_i|

    after Bereska et al. 2025 (arXiv:2512.13568). The weight by decoder norm makes it
    independent of how scale is split between code and decoder. 0 where nothing fires.

    Raises:
        ValueError: A contribution is negative or not finite.
    """
    if not (contributions.isfinite().all() and (contributions >= 0).all()):
        raise ValueError("Contributions must be finite and not negative: sums of f_i * |d_i|.")
    contributions = contributions.detach()
    total = contributions.sum(dtype=torch.float64)
    if total == 0:
        return 0.0
    share = contributions.double() / total
    return float(torch.special.entr(share).sum().exp())


class SparsityCounts:
    """Adds up firing over batches of codes of one dictionary."""

    def __init__(self, decoder_norms: Float[Tensor, " d_sae"]) -> None:
        self.decoder_norms = decoder_norms.double()
        self.n_rows = 0
        self.firing: Int[Tensor, " d_sae"] = torch.zeros(len(decoder_norms), dtype=torch.int64)
        self.activation_sums: Float[Tensor, " d_sae"] = torch.zeros(
            len(decoder_norms), dtype=torch.float64
        )

    def update(self, codes: Codes) -> None:
        """Take in a batch."""
        self.n_rows += codes.n_rows
        self.firing += codes.firing_counts()
        self.activation_sums.index_add_(0, codes.latents, codes.values.detach().double())

    def add_up(self, ranks: Ranks) -> None:
        """Take in what the other processes have counted of theirs."""
        self.n_rows = int(ranks.sum(torch.tensor(self.n_rows)))
        ranks.sum(self.firing)
        ranks.sum(self.activation_sums)

    @property
    def density(self) -> Float[Tensor, " d_sae"]:
        """Share of all rows in which each latent was on."""
        _check_rows(self.n_rows, "Density")
        return self.firing.double() / self.n_rows

    @property
    def l0(self) -> float:
        """Mean number of latents on in a row."""
        return float(self.density.sum())

    @property
    def n_alive(self) -> int:
        """Latents that were on at least once."""
        return int((self.firing > 0).sum())

    @property
    def n_ultralow(self) -> int:
        """Latents that were on, but in less than `ULTRALOW_DENSITY` of the rows."""
        return int(((self.firing > 0) & (self.density < ULTRALOW_DENSITY)).sum())

    @property
    def effective_features(self) -> float:
        """See `effective_features`."""
        return effective_features(self.activation_sums * self.decoder_norms)


def _check_rows(n_rows: int, name: str) -> None:
    if n_rows == 0:
        raise ValueError(f"{name} is undefined: there are no rows. Was every position masked?")
