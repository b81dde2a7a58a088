"""Scores of a dictionary against features that are known.

Shape letters: n features, d_sae latents, d_in width, k matched pairs.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saefeat.kernels.codes import Codes
from saefeat.metrics.sparsity import l0

LEAST_COSINE = 0.9
"""Above this a latent's direction is taken for that of the feature it is matched with."""
N_DECILES = 10
"""Classes of equal size into which the activations of a latent are put."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FeatureMatch:
    """Latents and features in pairs, no latent and no feature in more than one.

    There are as many pairs as the fewer of the two allow; some may have nothing in common.
    """

    latents: Int[Tensor, " k"]
    """The latent of each pair."""
    features: Int[Tensor, " k"]
    """Its feature."""
    cosines: Float[Tensor, " k"]
    """Cosine of their directions, in float64."""
    n_latents: int
    """Latents that could be matched."""
    n_features: int
    """Features that there are."""

    def n_found(self, least_cosine: float = LEAST_COSINE) -> int:
        """Pairs whose cosine is above a least one."""
        return int((self.cosines > least_cosine).sum())

    def recall(self, least_cosine: float = LEAST_COSINE) -> float:
        """Share of the features that were found."""
        return self.n_found(least_cosine) / self.n_features

    def precision(self, least_cosine: float = LEAST_COSINE) -> float:
        """Share of the latents that are features, each its own; 0 where there are no latents."""
        return self.n_found(least_cosine) / max(1, self.n_latents)

    @property
    def mcc(self) -> float:
        """Mean cosine of pairs, latents left over and features left over, those counted as 0.

            MCC = sum over pairs of max(0, cosine) / max(n_latents, n_features)

        The mean over pairs alone (Song et al. 2025, arXiv:2505.20254) is 1 for a dictionary
        of one latent that is right, and for one of thousands of which n are right.
        """
        return float(self.cosines.clamp(min=0).sum()) / max(self.n_latents, self.n_features)


def match_features(
    decoder: Float[Tensor, "d_sae d_in"],
    directions: Float[Tensor, "n d_in"],
    *,
    alive: Bool[Tensor, " d_sae"] | None = None,
) -> FeatureMatch:
    """Pairs latents with features so that the sum of their cosines is largest (Kuhn 1955).

    Cosines are signed: a latent fires in one direction only.

    Args:
        decoder: The direction of each latent, of any length; of length 0 it has cosine 0 with all.
        directions: Those of the features.
        alive: The latents to match; None for all. Where a latent never fires its direction means
            nothing.

    Raises:
        ValueError: A direction is not finite, or there are no features.
    """
    # 0.1 s to import, and only those who know the truth need it.
    from scipy.optimize import linear_sum_assignment

    if len(directions) == 0:
        raise ValueError("There are no features to match: `directions` has no rows.")
    if not (decoder.isfinite().all() and directions.isfinite().all()):
        raise ValueError(
            "A direction holds NaN or infinity. Did training diverge? Lower the learning rate."
        )
    latents = torch.arange(len(decoder), device=decoder.device)
    if alive is not None:
        latents = latents[alive]
    cosines = _unit(decoder[latents]) @ _unit(directions).T
    rows, columns = linear_sum_assignment(cosines.cpu().numpy(), maximize=True)
    rows, columns = (torch.from_numpy(x).to(decoder.device) for x in (rows, columns))
    return FeatureMatch(
        latents=latents[rows],
        features=columns,
        cosines=cosines[rows, columns],
        n_latents=len(latents),
        n_features=len(directions),
    )


def l0_ratio(codes: Codes, true_codes: Codes) -> float:
    """Latents on in a row, over features on in a row: 1 is right, above it features are split.

    Raises:
        ValueError: The codes are not of the same rows, or no feature is on in any.
    """
    _check_same_rows(codes, true_codes)
    truth = float(l0(true_codes))
    if truth == 0:
        raise ValueError(f"No feature is on in any of {true_codes.n_rows} rows. Give more rows.")
    return float(l0(codes)) / truth


def dead_fraction(codes: Codes) -> float:
    """Share of the latents that are on in none of the rows. Give the number of rows beside it.

    Raises:
        ValueError: There are no rows.
    """
    if codes.n_rows == 0:
        raise ValueError("The share of dead latents is undefined: there are no rows.")
    return 1 - int((codes.firing_counts() > 0).sum()) / codes.d_sae


def on_share_by_decile(
    codes: Codes,
    true_codes: Codes,
    match: FeatureMatch,
    *,
    least_cosine: float = LEAST_COSINE,
) -> Float[Tensor, "10"]:
    """P(a latent's feature is on | decile of the latent's activation), the lowest decile first.

    The activations of each latent above zero are put into ten equal classes by size, and classes
    of the same rank are counted together over all latents whose cosine with their feature is
    above `least_cosine`. Low activations of learned latents look polysemantic (Bricken et al.
    2023, "Towards Monosemanticity"): this is the share of them that is about the feature.

    Latents that are on in fewer than ten rows are left out; NaN where that leaves none.

    Raises:
        ValueError: The codes are not of the same rows, or have fewer latents or features than
            were matched.
    """
    _check_same_rows(codes, true_codes)
    found = match.cosines > least_cosine
    latents, features = match.latents[found], match.features[found]
    if not (latents < codes.d_sae).all() or not (features < true_codes.d_sae).all():
        raise ValueError(
            f"The match is of {match.n_latents} latents and {match.n_features} features, the codes "
            f"of {codes.d_sae} and {true_codes.d_sae}. Were they exchanged?"
        )
    feature_of = torch.full((codes.d_sae,), -1, device=codes.latents.device)
    feature_of[latents] = features
    counts = codes.firing_counts()
    is_used = (codes.values > 0) & (feature_of >= 0)[codes.latents]
    is_used &= (counts >= N_DECILES)[codes.latents]
    values, of_latent = codes.values[is_used], codes.latents[is_used]
    rows = codes.pattern.rows[is_used]
    # Sorted by latent, and by activation within a latent.
    order = values.argsort(stable=True)
    order = order[of_latent[order].argsort(stable=True)]
    rows, of_latent = rows[order], of_latent[order]
    n_used = torch.bincount(of_latent, minlength=codes.d_sae)
    first = n_used.cumsum(0) - n_used
    rank = torch.arange(len(order), device=rows.device) - first[of_latent]
    decile = rank * N_DECILES // n_used[of_latent]
    is_true = true_codes.values > 0
    n = true_codes.d_sae
    true_keys = true_codes.pattern.rows[is_true] * n + true_codes.latents[is_true]
    is_on = torch.isin(rows * n + feature_of[of_latent], true_keys)
    total = torch.bincount(decile, minlength=N_DECILES)
    return torch.bincount(decile[is_on], minlength=N_DECILES).double() / total


def _unit(directions: Float[Tensor, "m d_in"]) -> Float[Tensor, "m d_in"]:
    directions = directions.detach().double()
    norms = directions.norm(dim=1, keepdim=True)
    return directions / torch.where(norms > 0, norms, 1.0)


def _check_same_rows(codes: Codes, true_codes: Codes) -> None:
    if codes.n_rows != true_codes.n_rows:
        raise ValueError(
            f"The codes are of {codes.n_rows} rows and the true codes of {true_codes.n_rows}. "
            "Encode the rows that `sample` gave together with the true codes."
        )
