"""A run from its start, or its last checkpoint, to its end, in step with other processes if any."""

import logging
import signal
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saefeat.activations.batches import TrainingBatches
from saefeat.activations.sources import Batch
from saefeat.activations.stream import ActivationStream
from saefeat.core.distributed import Ranks
from saefeat.core.progress import progress_bar
from saefeat.core.tensor_parts import Part
from saefeat.training.bank import Bank
from saefeat.training.bank_learner import BankLearner, Measured
from saefeat.training.callbacks import Listeners
from saefeat.training.checkpoint import (
    Checkpoint,
    check_visible,
    load_newest,
    save_checkpoint,
    saying_how_to_go_on,
)
from saefeat.training.interruption import RunInterrupted, stop_requests
from saefeat.training.loggers import JSONLines
from saefeat.training.prefetch import prefetched
from saefeat.training.run_folder import RunFolder

CALLBACK_FAILED = 1
"""Why a run stops, where it is not the number of a signal."""

logger = logging.getLogger(__name__)


class Run:
    """What is trained on what, by which processes.

    Args:
        learner: The bank while it learns.
        stream: Where its batches come from.
        listeners: Told how it goes; in the first process alone.
        description: What `config.json` says of it.
        n_tokens: Rows of the whole run.
        log_every: Steps between records.
        progress: Whether to draw a progress bar.
        is_heard: Whether the first process has listeners.
        ranks: The processes.
    """

    def __init__(
        self,
        learner: BankLearner,
        stream: ActivationStream,
        listeners: Listeners,
        description: Mapping[str, Any],
        *,
        n_tokens: int,
        log_every: int,
        progress: bool,
        is_heard: bool,
        ranks: Ranks,
    ) -> None:
        self.learner = learner
        self.stream = stream
        self.listeners = listeners
        self.description = description
        self.n_tokens = n_tokens
        self.log_every = log_every
        self.progress = progress and ranks.is_first
        self.is_heard = is_heard
        self.ranks = ranks
        self.started = time.perf_counter()

    def in_memory(self) -> Bank:
        """Train from the start to the end, and write nothing."""
        learner, listeners = self.learner, self.listeners
        try:
            listeners.start(self.description, 0)
            with self._reading(self._batches(), lambda: False) as read:
                for batch, n_rows in read:
                    measured = learner.step(batch, n_rows)
                    if self.is_heard and self._is_logged():
                        for record in self._records(learner.of_all(measured)):
                            listeners.record(record)
                        listeners.raise_error("Without `out` nothing of the run is kept.")
            bank = learner.finish()
            listeners.end(bank)
        finally:
            listeners.end(None)
        if listeners.error is not None:
            # To raise it would lose the dictionaries, which are nowhere else.
            logger.error(
                "%s, after training had ended.", listeners.culprit, exc_info=listeners.error
            )
        return bank

    def in_folder(
        self, folder: RunFolder | None, path: Path, *, checkpoint_every: int, keep_last: int
    ) -> Bank:
        """Train from the last checkpoint that the folder holds, or from the start, to the end.

        Args:
            folder: The folder, in the first process; None in the others.
            path: Where it is.
            checkpoint_every: Steps between checkpoints.
            keep_last: Checkpoints that are kept.
        """
        learner, listeners, ranks = self.learner, self.listeners, self.ranks
        checkpoints = path / "checkpoints"
        ranks.on_all(lambda: check_visible(path, ranks))
        checkpoint = load_newest(checkpoints, ranks)
        last_step = checkpoint.step if checkpoint else 0
        ranks.on_first(lambda: _the(folder).cut_metrics(last_step))
        batches = self._batches(checkpoint)
        saves = False

        def why_to_stop() -> int:
            """The number of a signal that came to any process, or what else there is."""
            wish = stop.signal or (CALLBACK_FAILED if listeners.error is not None else 0)
            return int(ranks.maximum(torch.tensor(int(wish)))) if ranks.size > 1 else int(wish)

        def saves_after_this_step() -> bool:
            nonlocal saves
            stops = why_to_stop() != 0
            saves = stops or (learner.step_number + 1) % checkpoint_every == 0
            return saves

        listeners.start(self.description, learner.step_number)
        with (
            stop_requests() as stop,
            _metrics_file(folder) if folder else nullcontext() as metrics,
            self._reading(batches, saves_after_this_step) as read,
        ):
            for batch, n_rows in read:
                measured = learner.step(batch, n_rows)
                is_last = learner.n_tokens_seen >= self.n_tokens
                if self._is_logged():
                    for record in self._records(learner.of_all(measured)):
                        if metrics is not None:
                            metrics.record(record)
                        listeners.record(record)
                # A signal, or an error of a callback, that came during this step is heeded after
                # the next, whose batch is being read already.
                if saves and not is_last:
                    self._save(batches, checkpoints, keep_last)
                    why = why_to_stop()
                    if why > CALLBACK_FAILED:
                        raise RunInterrupted(
                            f"{signal.Signals(why).name} before step {learner.step_number} ended: "
                            f"a checkpoint is in {checkpoints}. Go on with resume=True (saefeat "
                            "train --resume)."
                        )
                    listeners.raise_error(
                        f"A checkpoint of step {learner.step_number} is in {checkpoints}: mend "
                        "the callback or leave it out, and go on with resume=True"
                    )
                    if why:
                        raise RunInterrupted(
                            f"A callback failed in the first process before step "
                            f"{learner.step_number} ended: a checkpoint is in {checkpoints}."
                        )
        bank = learner.finish()

        def finish() -> None:
            with saying_how_to_go_on("The trained dictionaries"):
                _the(folder).finish(bank)

        ranks.on_first(finish)
        listeners.end(bank)
        listeners.raise_error(f"The run has ended, and its dictionaries are in {path}")
        return bank

    def _batches(self, checkpoint: Checkpoint | None = None) -> TrainingBatches:
        """The batches to go on with, the learner set to the checkpoint, if there is one."""
        position = None
        wanted = self.learner.hooks_wanted
        if checkpoint is not None:
            training, saved_rows = checkpoint.training, checkpoint.stream_rows
            self.ranks.on_all(lambda: self.learner.restore(training))
            rows = {
                hook_name: saved_rows[hook_name]
                for hook_name in saved_rows
                if wanted is None or hook_name in wanted[self.ranks.rank]
            }
            position = (checkpoint.stream, rows)
        return self.stream.batches(self.n_tokens, position, ranks=self.ranks, wanted=wanted)

    @contextmanager
    def _reading(
        self, batches: Iterator[Batch], keeps_position: Callable[[], bool]
    ) -> Iterator[Iterator[tuple[Batch, int]]]:
        """The batches with their rows; when training ends, whatever ends it, so does reading.

        An error keeps what raised it alive for as long as it is looked at. A thread that still
        read then would hold locks, which a fork of the process never sees released.
        """
        with (
            closing(self._read(batches, keeps_position)) as read,
            closing(self._with_bar(read)) as counted,
        ):
            yield counted

    def _read(
        self, batches: Iterator[Batch], keeps_position: Callable[[], bool]
    ) -> Generator[Batch, None, None]:
        """The batches; several processes read them in step, and one reads ahead.

        Reading ahead is done in a thread, and collectives of two threads have no one order.
        """
        if self.ranks.size == 1:
            yield from prefetched(batches, keeps_position)
            return
        while True:
            batch = next(batches, None)
            has_one = int(batch is not None)
            some_have, some_lack = self.ranks.maximum(torch.tensor([has_one, 1 - has_one])).tolist()
            if some_have and some_lack:
                raise ValueError(
                    f"After step {self.learner.step_number} process {self.ranks.rank} of "
                    f"{self.ranks.size} has {'a' if has_one else 'no'} batch and another has "
                    f"{'none' if has_one else 'one'}. Give all the same stream: each reads its "
                    "own part of it."
                )
            if batch is None:
                return
            keeps_position()
            yield batch

    def _save(self, batches: TrainingBatches, checkpoints: Path, keep_last: int) -> None:
        facts, rows = batches.state()
        stream = (facts, {hook_name: self._share(hook_name, x) for hook_name, x in rows.items()})
        save_checkpoint(checkpoints, self.learner, stream, keep_last=keep_last, ranks=self.ranks)

    def _share(self, hook_name: str, rows: Tensor) -> Part:
        """What this process writes of rows of a hook that all who want it hold alike."""
        wanted = self.learner.hooks_wanted
        holders = [
            rank for rank in range(self.ranks.size) if wanted is None or hook_name in wanted[rank]
        ]
        own = Ranks(rank=holders.index(self.ranks.rank), size=len(holders)).part(len(rows))
        return Part(rows=rows[own], first=own.start, n=len(rows))

    def _is_logged(self) -> bool:
        is_last = self.learner.n_tokens_seen >= self.n_tokens
        return is_last or (self.learner.step_number - 1) % self.log_every == 0

    def _records(self, measured: Measured) -> Iterator[dict[str, Any]]:
        """What was measured in the step just made: a record for each dictionary."""
        position_now = {
            "step": self.learner.step_number,
            "n_tokens": self.learner.n_tokens_seen,
            "wall_seconds": round(time.perf_counter() - self.started, 3),
        }
        for key, terms in measured.items():
            name = dict(zip(("hook_name", "expansion_factor", "seed"), key, strict=True))
            yield {**position_now, **name, **{term: float(value) for term, value in terms.items()}}

    def _with_bar(self, batches: Iterable[Batch]) -> Generator[tuple[Batch, int], None, None]:
        """The batches, and the rows of each whole one, counted on a bar once they are used."""
        n_done = self.learner.n_tokens_seen
        with progress_bar(
            total=self.n_tokens, initial=n_done, unit="tok", desc="training", shown=self.progress
        ) as bar:
            for batch in batches:
                n_rows = min(self.stream.batch_size, self.n_tokens - self.learner.n_tokens_seen)
                yield batch, n_rows
                bar.update(n_rows)


def _the(folder: RunFolder | None) -> RunFolder:
    assert folder is not None
    return folder


@contextmanager
def _metrics_file(folder: RunFolder) -> Iterator[JSONLines]:
    metrics = JSONLines(folder.metrics)
    metrics.start({}, 0)
    try:
        yield metrics
    finally:
        metrics.end(None)
