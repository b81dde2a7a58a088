"""How the latents of a crosscoder lie over its hooks (Lindsey et al. 2024).

Shape letters: F latents, L hooks. The profile of a latent is v_l, the length of its decoder at
hook l in units in which all hooks weigh alike: a crosscoder's `hook_norms`. Leave latents that
are no features out of the profiles first (see `superposition.joint_features`); the decoders of
those that never fire are what the start has left of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saefeat.dictionaries.crosscoder import AcrossHooks, held


def effective_layers(profiles: Float[Tensor, "F L"]) -> Float[Tensor, " F"]:
    """The number of hooks over which each latent would be spread evenly.

        N_eff = (sum_l v_l^2)^2 / sum_l v_l^4

    From 1 for a latent of one hook to L; the participation ratio of its squared profile.

    Raises:
        ValueError: A latent has no decoder at any hook.
    """
    shares = _shares(profiles)
    return 1 / shares.square().sum(1)


def peak_share(profiles: Float[Tensor, "F L"]) -> Float[Tensor, " F"]:
    """The share of each latent's squared profile that lies at its strongest hook, 1/L to 1.

    Raises:
        ValueError: A latent has no decoder at any hook.
    """
    return _shares(profiles).amax(1)


def features_held(profiles: Float[Tensor, "F L"]) -> Int[Tensor, " L"]:
    """F_l, how many latents each hook holds: with v_l at least a tenth of the latent's largest."""
    return held(profiles).sum(0)


def reuse(profiles: Float[Tensor, "F L"]) -> float:
    """pi = sum_l F_l / F, how many hooks hold a latent on average.

    1 where the hooks divide the features among them, L where every feature persists through all.

    Raises:
        ValueError: There are no latents.
    """
    if len(profiles) == 0:
        raise ValueError("Reuse is undefined without latents. Did none of them fire?")
    return float(held(profiles).sum()) / len(profiles)


def decoder_cosines(crosscoder: AcrossHooks) -> Float[Tensor, "F L L"]:
    """Cosine of each latent's decoder at one hook with that at another.

    1 for a direction that stays as it is; it falls as a direction rotates from layer to layer.
    NaN where a decoder is 0, and between hooks of different widths, whose axes have nothing to
    do with each other; those of two models mean nothing either, though they can be computed.
    """
    blocks = crosscoder.W_dec.detach().split(crosscoder.widths, dim=1)
    shape = (crosscoder.d_sae, len(blocks), len(blocks))
    cosines = torch.full(shape, torch.nan, device=crosscoder.W_dec.device)
    units = [block / block.norm(dim=1, keepdim=True) for block in blocks]  # 0 / 0 is NaN
    for first, unit in enumerate(units):
        for second, other in enumerate(units):
            if unit.shape == other.shape:
                cosines[:, first, second] = (unit * other).sum(1)
    return cosines


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """How a number of features grows with the neurons that it spans."""

    slope: float
    """Of ln F on ln N. 1: as many features per neuron however many layers are taken together;
    below 1 layers share features; above it they have more together than by themselves."""
    standard_error: float
    """Of the slope, from the scatter about the line; NaN with two points, which have none."""
    n_points: int
    """Numbers that the line was fitted to."""


def feature_growth(n_features: Sequence[float], n_neurons: Sequence[float]) -> Growth:
    """Least squares of ln F on ln N, over crosscoders that span different numbers of neurons.

    Spans that lie within each other share their scatter, which the standard error takes to be
    independent: give disjoint spans where there are enough, or take it for a lower bound.

    Raises:
        ValueError: The numbers do not pair up, are not positive, or are all of one span.
    """
    is_positive = all(number > 0 for number in (*n_features, *n_neurons))
    if len(n_features) != len(n_neurons) or not is_positive or len(set(n_neurons)) < 2:
        raise ValueError(
            "The slope needs pairs of positive numbers of features and neurons, over two spans of "
            f"neurons at least; got {list(n_features)} and {list(n_neurons)}."
        )
    x = torch.tensor(n_neurons, dtype=torch.float64).log()
    y = torch.tensor(n_features, dtype=torch.float64).log()
    x, y = x - x.mean(), y - y.mean()
    spread = float(x.square().sum())
    slope = float(x @ y) / spread
    freedom = len(x) - 2
    scatter = float((y - slope * x).square().sum()) / freedom if freedom else math.nan
    return Growth(slope=slope, standard_error=math.sqrt(scatter / spread), n_points=len(x))


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerProfile:
    """How the features of a crosscoder lie over its hooks."""

    n_features: int
    """Latents that count as features."""
    effective_layers: float
    """Mean of `effective_layers`."""
    peak_share: float
    """Mean of `peak_share`."""
    reuse: float
    """pi; see `reuse`."""
    features_held: dict[str, int]
    """F_l by hook."""
    layers_held: dict[str, int]
    """How many latents are held by 1 hook, by 2, and so on to all."""
    cosines: dict[str, dict[str, float | None]]
    """Mean `decoder_cosines` of the latents that both hooks hold; None where none is."""


def layer_profile(crosscoder: AcrossHooks, counted: Bool[Tensor, " d_sae"]) -> LayerProfile:
    """Summarise the latents that `counted` marks.

    Raises:
        ValueError: It marks none.
    """
    profiles = crosscoder.hook_norms.detach()[counted]
    hooks = list(crosscoder.hook_widths)
    holds = held(profiles)
    counts = holds.sum(1)
    all_cosines = decoder_cosines(crosscoder)[counted]
    cosines: dict[str, dict[str, float | None]] = {}
    for first, second in combinations(range(len(hooks)), 2):
        mean = float(all_cosines[holds[:, first] & holds[:, second], first, second].mean())
        cosines.setdefault(hooks[first], {})[hooks[second]] = None if math.isnan(mean) else mean
    return LayerProfile(
        n_features=len(profiles),
        reuse=reuse(profiles),
        effective_layers=float(effective_layers(profiles).mean()),
        peak_share=float(peak_share(profiles).mean()),
        features_held=dict(zip(hooks, features_held(profiles).tolist(), strict=True)),
        layers_held={str(n): int((counts == n).sum()) for n in range(1, len(hooks) + 1)},
        cosines=cosines,
    )


def _shares(profiles: Float[Tensor, "F L"]) -> Float[Tensor, "F L"]:
    # By the largest first: the square of a short length would be 0 in float32.
    peaks = profiles.amax(1, keepdim=True)
    if not (profiles.isfinite().all() and (profiles >= 0).all() and (peaks > 0).all()):
        raise ValueError(
            "Profiles are lengths of decoders by hook, of which one at least is above 0 for every "
            "latent. Leave out latents that never fire."
        )
    squares = (profiles / peaks).square()
    return squares / squares.sum(1, keepdim=True)
