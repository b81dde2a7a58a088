"""`train_family`: models of several shapes and seeds, decayed to one loss."""

import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

from saefeat.core.processes import run_in_processes
from saefeat.core.progress import progress_bar
from saefeat.models.packaged import cache_folder
from saefeat.models.zoo.corpus import Corpus, tokenised
from saefeat.models.zoo.options import TrainingOptions
from saefeat.models.zoo.record import ZooModel
from saefeat.models.zoo.shapes import Shape
from saefeat.models.zoo.text import Text, load_text
from saefeat.models.zoo.training import train_model


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models of several shapes, each shape with the same seeds."""

    equal_loss: tuple[ZooModel, ...]
    """Decayed to the target, shape by shape and seed by seed; empty if that was not asked for."""
    equal_tokens: tuple[ZooModel, ...]
    """The same models after equally many tokens."""
    target_loss: float
    """In nats a token: the highest loss after all tokens, which every model can have."""

    @property
    def misses(self) -> tuple[ZooModel, ...]:
        """Those whose loss is not the target's within their tolerance."""
        return tuple(model for model in self.equal_loss if not model.reaches_target)

    def to_dict(self) -> dict[str, Any]:
        """Losses and tokens of all models, for JSON."""
        models: list[dict[str, Any]] = [
            {
                "shape": whole.shape.label,
                "seed": whole.seed,
                "n_tokens_of_all": whole.n_tokens,
                "validation_loss_of_all": whole.validation_loss,
            }
            for whole in self.equal_tokens
        ]
        # There are none where equal losses were not asked for.
        for facts, equal in zip(models, self.equal_loss, strict=False):
            facts |= {
                "n_tokens": equal.n_tokens,
                "validation_loss": equal.validation_loss,
                "reaches_target": equal.reaches_target,
            }
        return {"target_loss": self.target_loss, "models": models}


def train_family(
    shapes: Sequence[Shape],
    seeds: Sequence[int],
    options: TrainingOptions | None = None,
    *,
    text: str | Path | Text | None = None,
    out: str | Path | None = None,
    equal_loss: bool = True,
    target_loss: float | None = None,
    tolerance: float = 0.005,
    processes: int | None = None,
    progress: bool = True,
) -> Family:
    """Trains each shape with each seed, first on all tokens and then to a common loss.

    Models that are in `out` already, whole or in part, are not trained again: a second call
    finds all of them, and one that was killed is gone on with.

    Args:
        shapes: Of equal size; see `budget`.
        seeds: Of weights and order of text; each shape is trained once with each.
        options: How; the rate is by shape.
        text: What `load_text` takes or gives; None for the sources of Python's standard library.
        out: Folder of models; None for `zoo` in saefeat's cache folder.
        equal_loss: Whether to decay them to one loss too.
        target_loss: In nats a token; None for the highest loss that a model has after all tokens.
        tolerance: Share of the target that a loss may be away from it.
        processes: Models that are trained at a time, a thread each; None for as many as there
            are cores.
        progress: Whether to draw a bar.

    Raises:
        ValueError: There are no shapes or seeds, or some twice; or what `train_model` says.
    """
    for name, values in (("shapes", shapes), ("seeds", seeds)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} are some, and each once, got {list(values)}.")
    options = options or TrainingOptions()
    corpus = tokenised(text if isinstance(text, Text) else load_text(text), options.vocabulary_size)
    out = cache_folder() / "zoo" if out is None else Path(out)
    places = [(shape, seed) for shape in shapes for seed in seeds]
    processes = processes or os.cpu_count() or 1
    with multiprocessing.get_context("spawn").Manager() as manager:
        steps: Queue[int] = manager.Queue()

        def trained(name: str, target: float | None) -> tuple[ZooModel, ...]:
            # Deep models take longest: none of them is left for the end.
            order = sorted(range(len(places)), key=lambda i: -places[i][0].n_layers)
            calls = [(*places[i], corpus, options, out, target, tolerance, steps) for i in order]
            total = len(calls) * (options.n_tokens // options.tokens_per_step)
            known = total if target is None else None
            with progress_bar(desc=name, unit="step", total=known, shown=progress) as bar:

                def look() -> None:
                    while not steps.empty():
                        bar.update(steps.get())

                models = run_in_processes(_train, calls, processes, look=look)
            in_place = dict(zip(order, models, strict=True))
            return tuple(in_place[i] for i in range(len(places)))

        whole = trained("models", None)
        if target_loss is None:
            target_loss = max(model.validation_loss for model in whole)
        equal = trained("equal loss", target_loss) if equal_loss else ()
    return Family(equal_loss=equal, equal_tokens=whole, target_loss=target_loss)


def _train(
    shape: Shape,
    seed: int,
    corpus: Corpus,
    options: TrainingOptions,
    out: Path,
    target_loss: float | None,
    tolerance: float,
    steps: Any,
) -> ZooModel:
    unsent = 0

    def report(n_steps: int, shown: str) -> None:
        nonlocal unsent
        unsent += n_steps
        if unsent >= 50:
            steps.put(unsent)
            unsent = 0

    model = train_model(
        shape,
        corpus,
        seed=seed,
        options=options,
        out=out,
        target_loss=target_loss,
        tolerance=tolerance,
        progress=report,
    )
    steps.put(unsent)
    return model
