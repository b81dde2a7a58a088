"""What is known of a trained model beside its weights."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saefeat.core.files import read_json
from saefeat.core.records import entry, mapping
from saefeat.models.zoo.shapes import Shape


@dataclass(frozen=True, kw_only=True, slots=True)
class ZooModel:
    """A trained model on disk."""

    folder: Path
    """A Hugging Face model folder; `load_model` opens it."""
    shape: Shape
    """Its layers, width and heads."""
    seed: int
    """That of its weights and of the order of its text."""
    n_tokens: int
    """Tokens that it was trained on."""
    validation_loss: float
    """On held-out text, in nats a token."""
    target_loss: float | None = None
    """The loss that it was decayed to; None for a model decayed at the end of its run."""
    tolerance: float = 0.005
    """How far from the target its loss may be, as a share of the target."""

    @property
    def miss(self) -> float:
        """Its loss above the target, as a share of the target; NaN without a target."""
        return math.nan if self.target_loss is None else self.validation_loss / self.target_loss - 1

    @property
    def reaches_target(self) -> bool:
        """Whether its loss is the target's within the tolerance; false without a target."""
        return abs(self.miss) <= self.tolerance

    def load(self, **options: Any) -> Any:
        """The TransformerLens model; `dtype` and `device` are those of `load_model`."""
        from saefeat.models.load import load_model

        return load_model(self.folder, **options)

    def record(self) -> dict[str, Any]:
        """`zoo.json`: shape, seed, options, losses on the way, and the call that made it."""
        record: dict[str, Any] = read_json(self.folder / "zoo.json")
        return record

    def __str__(self) -> str:
        text = (
            f"{self.shape.label} seed {self.seed}: {self.validation_loss:.4f} nats after "
            f"{self.n_tokens:,} tokens"
        )
        if self.target_loss is None:
            return text
        verdict = "reached" if self.reaches_target else "NOT REACHED"
        return f"{text}; target {self.target_loss:.4f} {verdict} ({100 * self.miss:+.2f} %)"


def read_model(folder: str | Path) -> ZooModel:
    """The record of a model's folder.

    Raises:
        FileNotFoundError: There is no `zoo.json`.
        ValueError: It is damaged.
    """
    path = Path(folder) / "zoo.json"
    facts = mapping(read_json(path), path)
    return ZooModel(
        folder=Path(folder),
        shape=Shape(*entry(facts, "shape", tuple[int, int, int], path)),
        seed=entry(facts, "seed", int, path),
        n_tokens=entry(facts, "n_tokens", int, path),
        validation_loss=entry(facts, "validation_loss", float, path),
    )
