"""Training a model of the zoo: one stable phase, and decays from steps of it.

A run's folder holds `stable/step-*.safetensors`, states of the stable phase, and one model folder
for each decay, `decayed-from-<step>/`. A decay follows from its step alone, so that a model whose
loss has to be a given one is found by decaying earlier, and what was trained is never trained
again. Hägele et al. 2024 (arXiv:2405.18392) compare such decays to whole runs.
"""

import json
import logging
import platform
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from saefeat.core.files import (
    hash_bytes,
    publish_folder,
    read_tensors,
    temporary_folder,
    write_tensors,
)
from saefeat.core.folders import LocalFolder
from saefeat.core.locks import WriterLock
from saefeat.core.progress import progress_bar
from saefeat.models.zoo.corpus import Corpus, tokenised
from saefeat.models.zoo.decoder import write_model
from saefeat.models.zoo.optimisation import Optimisation, one_thread
from saefeat.models.zoo.options import TrainingOptions
from saefeat.models.zoo.record import ZooModel, read_model
from saefeat.models.zoo.shapes import Shape
from saefeat.models.zoo.target import next_step, slope
from saefeat.models.zoo.text import Text

FORMAT_VERSION = 1
"""Raise it when the same call would train other weights."""
MOST_DECAYS = 5
"""Decays that are tried for a target, that of the whole run included."""
SNAPSHOT_SHARE = 8
"""A snapshot's loss is measured on so many times fewer tokens than a finished model's."""

logger = logging.getLogger(__name__)

OnSteps = Callable[[int, str], None]
"""Is told how many steps have been made since, and what a progress bar may show."""


def train_model(
    shape: Shape,
    text: Text | Corpus,
    *,
    seed: int = 0,
    options: TrainingOptions | None = None,
    out: str | Path,
    target_loss: float | None = None,
    tolerance: float = 0.005,
    progress: bool | OnSteps = True,
) -> ZooModel:
    """Trains a decoder from scratch, or finds it where an equal call has put it.

    With one thread, on the processor. A run that was stopped in any way goes on from its last
    snapshot to the same bits.

    Args:
        text: What `load_text` gives, or its tokens.
        seed: Of the weights at the start and of the order of the contexts.
        out: Folder of runs. This one is in `<shape>-seed<seed>-<hash>` there, the hash being
            that of everything that decides the weights.
        target_loss: None decays at the end of the run. A loss in nats has the run decay where
            the result is expected to have it, by interpolation between decays that were tried;
            what comes nearest is given back, and says whether it `reaches_target`.
        tolerance: Share of the target by which the loss may miss it. Half of that ends the search.
        progress: Whether to draw a bar, or what is told of each step.

    Raises:
        BlockingIOError: Another process is training the same model there.
        FloatingPointError: The loss is no longer finite; the learning rate is said.
        ValueError: The text is too short, or its tokens are not those of the options.
    """
    options = (options or TrainingOptions()).resolved(shape)
    corpus = text if isinstance(text, Corpus) else tokenised(text, options.vocabulary_size)
    if corpus.vocabulary_size != options.vocabulary_size:
        raise ValueError(
            f"The corpus has {corpus.vocabulary_size} tokens and the options say "
            f"vocabulary_size={options.vocabulary_size}."
        )
    run = _Run(Path(out), shape, corpus, seed, options)
    whole = run.finished(options.n_stable_steps)
    if whole is not None and target_loss is None:
        return whole
    with (
        WriterLock(LocalFolder(run.folder)),
        one_thread(),
        progress_bar(
            desc=f"{shape.label} seed {seed}",
            unit="step",
            total=options.n_tokens // options.tokens_per_step,
            # How many steps a search for the target takes is not known.
            shown=progress is True and whole is None,
        ) as bar,
    ):
        run.report = progress if callable(progress) else _draw_on(bar)
        whole = run.decayed(options.n_stable_steps)
        return whole if target_loss is None else _decayed_to(run, whole, target_loss, tolerance)


class _Run:
    """One model's folder, and the training of what is not in it yet."""

    def __init__(
        self, out: Path, shape: Shape, corpus: Corpus, seed: int, options: TrainingOptions
    ) -> None:
        self.shape, self.corpus, self.seed, self.options = shape, corpus, seed, options
        self.report: OnSteps = lambda n_steps, shown: None
        self.facts: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "shape": [shape.n_layers, shape.d_model, shape.n_heads],
            "seed": seed,
            "options": asdict(options),
            "text": corpus.name,
            "text_digest": corpus.digest,
        }
        # What the text is called decides nothing.
        deciding = {name: value for name, value in self.facts.items() if name != "text"}
        digest = hash_bytes(json.dumps(deciding, sort_keys=True).encode())
        self.folder = out / f"{shape.label}-seed{seed}-{digest[:12]}"
        self._curve: list[list[float]] = []
        self.interval = -(-options.n_stable_steps // options.n_snapshots)

    def finished(self, n_stable_steps: int) -> ZooModel | None:
        """The model that was decayed from a step, if it is there."""
        folder = self._decay_folder(n_stable_steps)
        return read_model(folder) if (folder / "zoo.json").is_file() else None

    def decayed(self, n_stable_steps: int) -> ZooModel:
        """The model that is decayed from a step."""
        if (found := self.finished(n_stable_steps)) is not None:
            return found
        model = self._at(n_stable_steps)
        n_steps = self.options.n_decay_steps(n_stable_steps)
        if n_stable_steps == self.options.n_stable_steps:
            # To the last token of the run, which rounding might miss.
            n_steps = self.options.n_tokens // self.options.tokens_per_step - n_stable_steps
        losses = []
        for step in range(n_steps):
            losses.append(model.step(1 - (step + 1) / (n_steps + 1)))
            self.report(1, f"{losses[-1]:.3f}")
        loss = model.validation_loss(self.options.validation_tokens)
        folder = self._decay_folder(n_stable_steps)
        record = self.facts | {
            "n_tokens": model.step_number * self.options.tokens_per_step,
            "n_stable_steps": n_stable_steps,
            "n_decay_steps": n_steps,
            "validation_loss": loss,
            "last_training_loss": sum(losses[-100:]) / len(losses[-100:]),
            "curve": {
                "columns": ["step", "training_loss", "validation_loss"],
                "rows": [row for row in self._curve if row[0] <= n_stable_steps],
            },
            "call": f"train_model({self.shape}, text, seed={self.seed}, options={self.options})",
            "command": " ".join(sys.argv),
            "saefeat": metadata.version("saefeat"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        with temporary_folder(folder) as draft:
            write_model(
                draft,
                self.shape,
                model.weights,
                tokenizer=self.corpus.tokenizer,
                context_size=self.options.context_size,
                record=record,
            )
            publish_folder(draft, folder)
        return read_model(folder)

    def _decay_folder(self, n_stable_steps: int) -> Path:
        return self.folder / f"decayed-from-{n_stable_steps}"

    def _snapshots(self) -> list[Path]:
        return sorted((self.folder / "stable").glob("step-*.safetensors"))

    def _at(self, n_steps: int) -> Optimisation:
        """The model after so many steps of the stable phase."""
        model = Optimisation(self.shape, self.corpus, seed=self.seed, options=self.options)
        self._curve = []
        for path in reversed(self._snapshots()):
            if int(path.stem.removeprefix("step-")) > n_steps:
                continue
            try:
                state = read_tensors(path)
                self._curve = state.pop("curve").tolist()
                model.restore(state)
                break
            except (ValueError, KeyError) as problem:
                logger.warning("%s is damaged (%s); the one before is tried.", path, problem)
        self.report(model.step_number, "")
        losses: list[float] = []
        while model.step_number < n_steps:
            losses.append(model.step(model.warmup_factor()))
            self.report(1, f"{losses[-1]:.3f}")
            is_end = model.step_number == self.options.n_stable_steps
            if model.step_number % self.interval == 0 or is_end:
                tokens = self.options.validation_tokens // SNAPSHOT_SHARE
                validation = model.validation_loss(tokens)
                self._curve.append([model.step_number, sum(losses) / len(losses), validation])
                self._write_snapshot(model)
                losses = []
        return model

    def _write_snapshot(self, model: Optimisation) -> None:
        path = self.folder / "stable" / f"step-{model.step_number:09d}.safetensors"
        if path.is_file():
            return
        curve = torch.tensor(self._curve, dtype=torch.float64)
        write_tensors(path, model.state() | {"curve": curve})
        # Nothing is decayed from the first half, but a run may have to go on from it.
        for older in self._snapshots()[:-1]:
            if 2 * int(older.stem.removeprefix("step-")) < self.options.n_stable_steps:
                older.unlink()


def _decayed_to(run: _Run, whole: ZooModel, target: float, tolerance: float) -> ZooModel:
    """The decay whose loss is nearest to the target."""
    last = run.options.n_stable_steps
    tried = {last: whole}
    if whole.validation_loss < target:
        rows = whole.record()["curve"]["rows"]
        steepness = slope([(int(step), loss) for step, _, loss in rows])
        while len(tried) < MOST_DECAYS:
            nearest = _nearest(tried.values(), target)
            if abs(nearest.validation_loss / target - 1) <= tolerance / 2:
                break
            losses = {step: model.validation_loss for step, model in tried.items()}
            step = next_step(losses, target, steepness, least=run.interval)
            if step is None:
                break
            tried[step] = run.decayed(step)
    nearest = _nearest(tried.values(), target)
    return replace(nearest, target_loss=target, tolerance=tolerance)


def _nearest(models: Iterable[ZooModel], target: float) -> ZooModel:
    return min(models, key=lambda model: abs(model.validation_loss - target))


def _draw_on(bar: Any) -> OnSteps:
    def report(n_steps: int, shown: str) -> None:
        bar.update(n_steps)
        if shown and bar.n % 50 == 0:
            bar.set_postfix_str(f"loss {shown}", refresh=False)

    return report
