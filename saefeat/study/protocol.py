"""What decides the result of the study, fixed and written down before there is one."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from saefeat.models.zoo import FAMILY, A, B, Shape, TrainingOptions
from saefeat.study.rules import Rules

HOOKS = {"mlp": "blocks.{}.mlp.hook_post", "residual": "blocks.{}.hook_resid_post"}
"""The hook point of a layer, for each site."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """Every choice that the result of a study depends on; the same for models of all shapes.

    Raises:
        ValueError: A number is out of range, or a list is too short or names one thing twice.
    """

    shapes: tuple[Shape, ...] = (A, B)
    """What is compared; of models of one's own, the shapes that they have."""
    pair: tuple[str, str] = (A.label, B.label)
    """Labels of the narrow and the wide shape that the table is of."""
    training: TrainingOptions = field(default_factory=TrainingOptions)
    """How the zoo is trained."""
    model_seeds: tuple[int, ...] = (0, 1, 2, 3)
    """Replicates of each shape."""
    random_seeds: tuple[int, ...] = (0, 1, 2, 3)
    """Models of each shape that stay as they were initialised: the control. With fewer than
    `rules.least_replicates` it has no slope."""
    sites: tuple[str, ...] = ("mlp", "residual")
    """Where features are counted: see `HOOKS`."""
    layers_per_model: int | None = 2
    """Counted layers of a model, evenly spaced, the last among them; None for all."""
    context_size: int = 64
    """Tokens in a context, of the text that is read to count."""
    n_tokens: int = 300_000
    """Rows that a layer is counted on, the same text for all models."""
    held_out_tokens: int = 60_000
    """Rows of the other documents, that dictionaries are measured and correlated on."""
    count_seeds: tuple[int, ...] = (0, 1, 2)
    """Random starts of a count."""
    picks: tuple[int, ...] = (1, 2)
    """What `count_features` may choose from."""
    expansion_factors: tuple[float, ...] = (2, 4)
    """The same for the width, in atoms per neuron."""
    sae_seeds: tuple[int, ...] = (0, 1)
    """Of the BatchTopK SAEs, and of those whose decoder is frozen."""
    sae_k: int = 4
    """Latents that an SAE keeps on for a token, the same for all shapes."""
    sae_width: float = 2.0
    """Latents of an SAE, over what was counted, or over the neurons if those are more."""
    crosscoder_sites: tuple[str, ...] = ("residual",)
    """Where to train one over all layers of each model, for the reuse of features: what is in the
    residual stream can persist, while the hidden neurons of each MLP are its own."""
    rules: Rules = field(default_factory=Rules)
    """Levels and margins of the verdict."""

    def __post_init__(self) -> None:
        unknown = sorted({*self.sites, *self.crosscoder_sites} - set(HOOKS))
        if unknown or not self.sites:
            raise ValueError(f"sites are some of {', '.join(HOOKS)}, got {list(self.sites)}.")
        if len(self.shapes) < 2 or len(self.model_seeds) < 2 or len(self.sae_seeds) < 2:
            raise ValueError(
                "A study compares at least 2 shapes by at least 2 model seeds each, with at least "
                f"2 SAE seeds, got {len(self.shapes)}, {len(self.model_seeds)} and "
                f"{len(self.sae_seeds)}."
            )
        widths = {shape.label: shape.d_model for shape in self.shapes}
        narrow, wide = (widths.get(label) for label in self.pair)
        if narrow is None or wide is None or narrow >= wide:
            raise ValueError(
                f"pair names a narrow shape and a wider one of {list(widths)} (layers x width), "
                f"got {self.pair}."
            )
        for name in ("shapes", "model_seeds", "random_seeds", "count_seeds", "sae_seeds", "sites"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} names each once, got {list(getattr(self, name))}.")
        for name in ("n_tokens", "held_out_tokens", "context_size", "sae_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.layers_per_model is not None and self.layers_per_model < 1:
            raise ValueError(f"layers_per_model must be 1 or more, got {self.layers_per_model}.")

    def layers(self, n_layers: int) -> list[int]:
        """Which layers of a model of so many are counted."""
        wanted = min(self.layers_per_model or n_layers, n_layers)
        return [(i + 1) * n_layers // wanted - 1 for i in range(wanted)]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def quick() -> Protocol:
    """Minutes: proves that the pipeline runs, and nothing else."""
    return Protocol(
        training=replace(TrainingOptions(), n_tokens=400_000),
        model_seeds=(0, 1),
        random_seeds=(0,),
        sites=("residual",),
        layers_per_model=2,
        n_tokens=60_000,
        held_out_tokens=20_000,
    )


def full() -> Protocol:
    """All shapes and layers, 5 model seeds, 3 SAE seeds: a day on two cores."""
    return Protocol(
        shapes=FAMILY,
        model_seeds=(0, 1, 2, 3, 4),
        layers_per_model=None,
        random_seeds=(0, 1, 2, 3, 4),
        n_tokens=2_000_000,
        held_out_tokens=100_000,
        picks=(1, 2, 4, 8, 16),
        expansion_factors=(2, 4, 8, 16),
        sae_seeds=(0, 1, 2),
    )


PRESETS = {"quick": quick, "default": Protocol, "full": full}
