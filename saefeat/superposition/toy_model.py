"""The toy model of superposition, many at a time (Elhage et al. 2022, arXiv:2209.10652).

    h = sum_i x_i W_i,    x'_i = ReLU(W_i . h + b_i),    loss = sum_i I_i (x_i - x'_i)^2

n features, each 0 but with probability p (the paper's 1 - S) and else uniform in [0, 1], are
squeezed into m dimensions and read back. W_i is the direction of feature i. The rarer the
features, the more of them the model stores, in regular polytopes whose features each take the
same fraction of a dimension.

Letters: n features, m dimensions; models are the pairs of a density and a seed, density-major.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saefeat.core.devices import resolve_device
from saefeat.training.schedules import learning_rate_factor

PLATEAUS = {
    "a dimension each": 1.0,
    "tetrahedron": 3 / 4,
    "triangle": 2 / 3,
    "antipodal pair": 1 / 2,
    "pentagon": 2 / 5,
    "square antiprism": 3 / 8,
}
"""Dimensions per feature in the polytopes on which trained features gather (Elhage et al. 2022,
"The Geometry of Superposition")."""

LOWEST_DENSITY = 1e-5
"""Below it the values of rare features, made from float32 uniforms, get coarser than 0.6 %."""


class ToyModels(nn.Module):
    """Toy models of every density and seed, in one batched tensor.

    A model starts from and sees what its seed says, whatever it is trained beside: models of one
    seed start equal, and the features on at a density are on at every higher one too.

    Attributes:
        W: [models, n, m], a feature's direction a row.
        b: [models, n].
        density: [models], P(x_i > 0), the paper's 1 - S.
        seed: [models].
        importance: [n], the weights I_i of the loss.

    Raises:
        ValueError: A size is below 1, there are no densities or seeds, a seed comes twice, a
            density is not in [`LOWEST_DENSITY`, 1], or the importance is not n numbers that are
            finite and not negative.
    """

    density: Float[Tensor, " models"]
    seed: Int[Tensor, " models"]
    importance: Float[Tensor, " n"]

    def __init__(
        self,
        *,
        n_features: int,
        n_dims: int,
        densities: Sequence[float],
        seeds: Sequence[int] = (0,),
        importance: Float[Tensor, " n"] | Sequence[float] | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__()
        _check_population(n_features, n_dims, densities, seeds)
        on = resolve_device(device)
        if importance is None:
            importance = torch.ones(n_features)
        weights = torch.as_tensor(importance, dtype=torch.float32)
        if weights.shape != (n_features,) or not (weights.isfinite() & (weights >= 0)).all():
            raise ValueError(
                f"`importance` must be {n_features} numbers, one a feature, finite and not "
                f"negative; got shape {tuple(weights.shape)}."
            )
        if not weights.any():
            raise ValueError("`importance` is 0 for every feature: there is nothing to learn.")
        self.generators = [torch.Generator(on).manual_seed(seed) for seed in seeds]
        # Xavier's scale: rows shorter than 1 that have still to grow where a feature pays.
        scale = math.sqrt(2 / (n_features + n_dims))
        starts = torch.stack(
            [
                scale * torch.randn(n_features, n_dims, generator=generator, device=on)
                for generator in self.generators
            ]
        )
        self.W = nn.Parameter(starts.repeat(len(densities), 1, 1))
        self.b = nn.Parameter(torch.zeros(len(self.W), n_features, device=on))
        self.register_buffer("importance", weights.to(on))
        self.register_buffer(
            "density", torch.tensor(densities, device=on).repeat_interleave(len(seeds)).float()
        )
        self.register_buffer("seed", torch.tensor(seeds, device=on).repeat(len(densities)))

    def sample(self, batch_size: int) -> Float[Tensor, "models batch n"]:
        """The next inputs of every model."""
        n_features = len(self.importance)
        uniform = torch.stack(
            [
                torch.rand(batch_size, n_features, generator=generator, device=self.W.device)
                for generator in self.generators
            ]
        )
        # One number says both: u is below p with probability p, and u / p then is uniform.
        per_seed = self.density.reshape(-1, len(self.generators), 1, 1)
        return (1 - uniform / per_seed).clamp(min=0).flatten(0, 1)

    def forward(self, x: Float[Tensor, "models batch n"]) -> Float[Tensor, "models batch n"]:
        """What each model reads back of its inputs."""
        pre_activation: Tensor = torch.baddbmm(self.b[:, None], x @ self.W, self.W.mT)
        return pre_activation.relu()

    def loss(self, x: Float[Tensor, "models batch n"]) -> Float[Tensor, " models"]:
        """Importance-weighted squared error of each model, mean over its inputs."""
        loss: Tensor = (x - self(x)).square().mean(dim=1) @ self.importance
        return loss


def train_toy_models(
    *,
    n_features: int,
    n_dims: int,
    densities: Sequence[float],
    seeds: Sequence[int] = (0,),
    importance: Float[Tensor, " n"] | Sequence[float] | None = None,
    n_steps: int = 4_000,
    batch_size: int = 256,
    learning_rate: float = 1e-2,
    decay_fraction: float = 0.5,
    device: str | torch.device = "cpu",
) -> ToyModels:
    """Train a toy model for every density and seed, all at once.

    Adam, with a short warm-up and a rate that falls to 0 over the last `decay_fraction` of the
    steps: without the fall, the noise of the batches hides the plateaus. Two calls with equal
    arguments give equal weights on one machine.

    Args:
        n_features: n.
        n_dims: m, the dimensions that the features share.
        densities: P(x_i > 0) = 1 - S, a model each.
        seeds: Of starts and inputs, a model each for every density.
        importance: I_i, n numbers; 1 for every feature where it is not given.
        n_steps: Steps of Adam.
        batch_size: Inputs of each model in a step.
        learning_rate: Its peak.
        decay_fraction: Share of the steps over which the rate falls.
        device: As in `sf.train`.

    Returns:
        The trained models, density-major: model d * len(seeds) + s.

    Raises:
        ValueError: As `ToyModels`, or an argument of the training is out of its range.
        FloatingPointError: The loss of a model is not finite.
    """
    if min(n_steps, batch_size) < 1 or not (0 < learning_rate < math.inf):
        raise ValueError(
            "Training needs n_steps >= 1, batch_size >= 1 and a finite learning_rate > 0, got "
            f"{n_steps}, {batch_size} and {learning_rate}."
        )
    if not 0 <= decay_fraction <= 1:
        raise ValueError(f"decay_fraction is a share of the steps, got {decay_fraction}.")
    models = ToyModels(
        n_features=n_features,
        n_dims=n_dims,
        densities=densities,
        seeds=seeds,
        importance=importance,
        device=device,
    )
    optimizer = torch.optim.Adam(models.parameters(), lr=learning_rate)
    for step in range(n_steps):
        factor = learning_rate_factor(
            step, n_steps, warmup_fraction=0.02, decay_fraction=decay_fraction
        )
        optimizer.param_groups[0]["lr"] = factor * learning_rate
        optimizer.zero_grad()
        # Each model's weights meet its own loss alone, and Adam minds no scale: a sum will do.
        loss = models.loss(models.sample(batch_size)).sum()
        loss.backward()
        optimizer.step()
    if not loss.isfinite():
        raise FloatingPointError(
            f"Toy models diverged: loss {float(loss.detach())} after {n_steps} steps at learning "
            f"rate {learning_rate}. Lower it."
        )
    return models.requires_grad_(False)


def feature_dimensionality(
    directions: Float[Tensor, "*models n m"],
) -> Float[Tensor, "*models n"]:
    """The share of a dimension that each feature has for itself.

        D_i = |W_i|^2 / sum_j (W_i / |W_i| . W_j)^2

    Between 0 and 1; 0 for a row of zeros. Over all features it sums to at most the rank of W,
    hence to at most m (Elhage et al. 2022, "The Geometry of Superposition").

    Args:
        directions: W, a feature a row; any leading axes.
    """
    length = directions.norm(dim=-1, keepdim=True)
    # A row of zeros has no direction; whatever stands for it, its numerator is 0.
    unit = directions / length.where(length > 0, 1)
    overlap: Tensor = (unit @ directions.mT).square().sum(dim=-1)
    dimensionality: Tensor = length.squeeze(-1).square() / overlap.where(overlap > 0, 1)
    return dimensionality


def features_per_dimension(directions: Float[Tensor, "*models n m"]) -> Float[Tensor, "*models"]:
    """Features over the dimensions that hold them: |W|_F^2 / m (Elhage et al. 2022).

    A feature that is stored counts about 1, its norm squared, one that is left out about 0.
    """
    return directions.square().sum(dim=(-2, -1)) / directions.shape[-1]


def dimensions_per_feature(directions: Float[Tensor, "*models n m"]) -> Float[Tensor, "*models"]:
    """D* = m / |W|_F^2, the inverse of `features_per_dimension`; infinite where W is 0."""
    return 1 / features_per_dimension(directions)


def n_represented(
    directions: Float[Tensor, "*models n m"], min_norm: float = 0.5
) -> Int[Tensor, "*models"]:
    """Features whose norm is above `min_norm`. Norms gather near 0 and 1, so 0.5 parts them."""
    count: Tensor = (directions.norm(dim=-1) > min_norm).sum(dim=-1)
    return count


def _check_population(
    n_features: int, n_dims: int, densities: Sequence[float], seeds: Sequence[int]
) -> None:
    if min(n_features, n_dims) < 1:
        raise ValueError(
            f"A toy model needs n_features >= 1 and n_dims >= 1, got {n_features} and {n_dims}."
        )
    if not densities or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(
            "Toy models need at least one density and one seed, and every seed once; got "
            f"{len(densities)} densities and seeds {list(seeds)}."
        )
    for density in densities:
        if not LOWEST_DENSITY <= density <= 1:
            raise ValueError(
                f"A density is P(x_i > 0) = 1 - S, in [{LOWEST_DENSITY}, 1]; got {density}. "
                "Is it a sparsity S, or 1 / (1 - S)?"
            )
