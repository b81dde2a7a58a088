"""`train`: a bank of dictionaries from one pass over a stream."""

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saefeat.activations.batches import TrainingBatches
from saefeat.activations.sources import Batch
from saefeat.activations.stream import ActivationStream
from saefeat.core.devices import fastest_dtype, resolve_device
from saefeat.core.progress import progress_bar
from saefeat.dictionaries.base import Dictionary, DictionaryConfig
from saefeat.kernels.dispatch import choose_kernels
from saefeat.training.bank import Bank, Key
from saefeat.training.bank_learner import BankLearner
from saefeat.training.callbacks import Callback, Listeners
from saefeat.training.checkpoint import Checkpoint, save_checkpoint
from saefeat.training.fitting import check_fit
from saefeat.training.interruption import RunInterrupted, stop_requests
from saefeat.training.loggers import JSONLines
from saefeat.training.new_bank import blank_dictionaries, copies
from saefeat.training.prefetch import prefetched
from saefeat.training.requirements import Requirements
from saefeat.training.run_folder import RunFolder

logger = logging.getLogger(__name__)


def train(
    stream: ActivationStream,
    config: DictionaryConfig | Bank,
    *,
    expansion_factors: Sequence[float] = (8,),
    seeds: Sequence[int] = (0,),
    targets: Mapping[str, str] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    n_tokens: int,
    out: str | Path | None = None,
    device: str | torch.device = "auto",
    kernels: str = "auto",
    checkpoint_every: int = 500,
    keep_last: int = 2,
    resume: bool = False,
    log_every: int = 10,
    progress: bool = True,
    check_memory: bool = True,
    callbacks: Sequence[Callback] = (),
    notes: Mapping[str, Any] | None = None,
) -> Bank:
    """Train one dictionary for every hook, expansion factor and seed, all in the same pass.

    Every dictionary sees the same batches in the same order; a seed decides only its initial
    weights. With the same stream, seeds and machine the weights are bit-identical.

    Args:
        stream: Where the activations come from; only its training part is read.
        config: What kind of dictionary, and its recipe; or a bank to train further, by the
            recipes that its dictionaries hold. The bank itself stays as it is, and
            `expansion_factors`, `seeds`, `targets` and `groups` are its own.
        expansion_factors: d_sae / d_in of each dictionary; fractions are fine. For a crosscoder
            d_in is the mean width of its hooks, so that it has the latents of one dictionary of
            one hook, and as many weights as such dictionaries of all its hooks together.
        seeds: Seeds of the initial weights.
        targets: None trains a dictionary of every hook. {hook: other hook} trains transcoders
            instead, which read the one and predict the other: {"blocks.3.ln2.hook_out":
            "blocks.3.hook_mlp_out"}, say. Hooks that are no key train nothing.
        groups: Names of sets of hooks, a crosscoder of each: {"early": ["blocks.0.hook_out",
            "blocks.1.hook_out"]}, say, whose crosscoder is `bank["early", 8, 0]`. A pattern
            stands for all hooks of the stream that it matches. None makes one crosscoder of all
            hooks, named by `group_name`.
        n_tokens: Rows of activations to learn from; more than the stream has means several
            epochs, each in a new order.
        out: A new folder for the run: `config.json` first, `metrics.jsonl` and `checkpoints/` as
            it goes, and the dictionaries under `saes/` at the end. None keeps everything in
            memory.
        device: "auto" is CUDA where there is one.
        kernels: "auto", or a backend by name; the choice is written to `config.json`.
        checkpoint_every: Steps between checkpoints in `out`. One holds the weights with all that
            training keeps of them, and the shuffle buffer of a live stream.
        keep_last: Checkpoints that are kept.
        resume: Goes on with the run in `out`, to the very weights that it would have ended with;
            begins it if the folder holds none, and hands it out if it has ended.
        log_every: Steps between records in `metrics.jsonl`.
        progress: Whether to draw a progress bar on standard error.
        check_memory: Whether to refuse, before anything is made, a run that will not fit in the
            memory or on the disk that are free; `plan` says what it would take.
        callbacks: Are told of the start, of what is measured every `log_every` steps, and of the
            end: `loggers.TensorBoard`, `loggers.WeightsAndBiases`, or a `Callback` of your own.
        notes: What else `config.json` is to say, under that name; JSON can hold it.

    Returns:
        The dictionaries, reading raw activations (the scale of training is folded in).

    Raises:
        ValueError: An option is out of range, an activation is not finite, a hook is constant,
            or a loss stops being finite; hook and step are named. Or the run does not fit; an
            option with which it does is named.
        FileExistsError: `out` already holds files, and `resume` is not set.
        BlockingIOError: Another process is writing to `out`.
        CallbackError: A callback raised. With `out` a checkpoint is written one step later, or
            the dictionaries after the last step, before it is raised.
        RunInterrupted: SIGINT or SIGTERM came while training in `out` from the main thread; the
            step was finished and a checkpoint written. (A KeyboardInterrupt, as without `out`.)
    """
    for name, value in (
        ("n_tokens", n_tokens),
        ("log_every", log_every),
        ("checkpoint_every", checkpoint_every),
        ("keep_last", keep_last),
    ):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}.")
    if resume and out is None:
        raise ValueError("resume=True needs out, the folder of the run to go on with.")
    device = resolve_device(device)
    kernel_name, backend = choose_kernels(kernels, device)
    further = isinstance(config, Bank)
    if check_memory:
        run_size = Requirements.of(
            stream,
            config,
            expansion_factors=expansion_factors,
            seeds=seeds,
            targets=targets,
            groups=groups,
            n_tokens=n_tokens,
            log_every=log_every,
            checkpoint_every=checkpoint_every,
            keep_last=keep_last,
            device=device,
        )
        check_fit(run_size, None if out is None else Path(out))
    dictionaries = (
        copies(stream, config)
        if isinstance(config, Bank)
        else blank_dictionaries(stream, config, expansion_factors, seeds, targets, groups)
    )
    learner = BankLearner(
        dictionaries,
        trained=further,
        n_tokens=n_tokens,
        n_steps=math.ceil(n_tokens / stream.batch_size),
        device=device,
        kernels=backend,
        selection_dtype=fastest_dtype(device),
    )
    description = {
        "dictionaries": [_described(key, one) for key, one in dictionaries.items()],
        "trained_further": further,
        "model": stream.model_name,
        "hooks": {name: stream.widths[name] for name in stream.hooks},
        "n_tokens": n_tokens,
        "batch_size": stream.batch_size,
        "stream_seed": stream.seed,
        "stream": stream.fingerprint,
        "device": str(device),
        "kernels": kernel_name,
        "selection_dtype": str(learner.selection_dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "notes": dict(notes or {}),
    }
    listeners = Listeners(callbacks)
    if out is None:
        return _run_in_memory(
            learner,
            stream,
            listeners,
            description,
            n_tokens=n_tokens,
            log_every=log_every,
            progress=progress,
        )
    folder = RunFolder(Path(out), description, resume=resume)
    try:
        if folder.is_finished:
            return Bank.load(folder.path)
        return _run_in(
            folder,
            learner,
            stream,
            listeners,
            description,
            n_tokens=n_tokens,
            checkpoint_every=checkpoint_every,
            keep_last=keep_last,
            log_every=log_every,
            progress=progress,
        )
    finally:
        listeners.end(None)
        folder.close()


def _run_in_memory(
    learner: BankLearner,
    stream: ActivationStream,
    listeners: Listeners,
    description: Mapping[str, Any],
    *,
    n_tokens: int,
    log_every: int,
    progress: bool,
) -> Bank:
    """Train from the start to the end, and write nothing."""
    started = time.perf_counter()
    try:
        listeners.start(description, 0)
        batches = prefetched(stream.batches(n_tokens), lambda: False)
        for batch in _with_bar(batches, n_tokens, 0, progress):
            measured = learner.step(batch)
            if len(listeners) and _is_logged(learner, n_tokens, log_every):
                for record in _records(learner, measured, started):
                    listeners.record(record)
                listeners.raise_error("Without `out` nothing of the run is kept.")
        bank = learner.finish()
        listeners.end(bank)
    finally:
        listeners.end(None)
    if listeners.error is not None:
        # To raise it would lose the dictionaries, which are nowhere else.
        logger.error("%s, after training had ended.", listeners.culprit, exc_info=listeners.error)
    return bank


def _run_in(
    folder: RunFolder,
    learner: BankLearner,
    stream: ActivationStream,
    listeners: Listeners,
    description: Mapping[str, Any],
    *,
    n_tokens: int,
    checkpoint_every: int,
    keep_last: int,
    log_every: int,
    progress: bool,
) -> Bank:
    """Train from the last checkpoint that the folder holds, or from the start, to the end."""
    started = time.perf_counter()
    batches = _restored(folder, learner, stream, n_tokens)

    def save() -> None:
        facts, rows = batches.state()
        now = Checkpoint(
            step=learner.step_number, training=learner.state(), stream=facts, stream_rows=rows
        )
        with _saying_how_to_go_on(f"The checkpoint after step {now.step}"):
            save_checkpoint(folder.checkpoints, now, learner.snapshots(), keep_last=keep_last)

    saves = False

    def saves_after_this_step() -> bool:
        nonlocal saves
        is_due = (learner.step_number + 1) % checkpoint_every == 0
        saves = is_due or stop.signal is not None or listeners.error is not None
        return saves

    listeners.start(description, learner.step_number)
    with stop_requests() as stop, _metrics_file(folder) as metrics:
        fetched = prefetched(batches, saves_after_this_step)
        for batch in _with_bar(fetched, n_tokens, learner.n_tokens_seen, progress):
            measured = learner.step(batch)
            is_last = learner.n_tokens_seen >= n_tokens
            if _is_logged(learner, n_tokens, log_every):
                for record in _records(learner, measured, started):
                    metrics.record(record)
                    listeners.record(record)
            # A signal, or an error of a callback, that came during this step is heeded after the
            # next, whose batch is being read already.
            if saves and not is_last:
                save()
                if stop.signal is not None:
                    raise RunInterrupted(
                        f"{stop.signal.name} before step {learner.step_number} ended: a checkpoint "
                        f"is in {folder.checkpoints}. Go on with resume=True (saefeat train "
                        "--resume)."
                    )
                listeners.raise_error(
                    f"A checkpoint of step {learner.step_number} is in {folder.checkpoints}: mend "
                    "the callback or leave it out, and go on with resume=True"
                )
    bank = learner.finish()
    with _saying_how_to_go_on("The trained dictionaries"):
        folder.finish(bank)
    listeners.end(bank)
    listeners.raise_error(f"The run has ended, and its dictionaries are in {folder.path}")
    return bank


@contextmanager
def _metrics_file(folder: RunFolder) -> Iterator[JSONLines]:
    metrics = JSONLines(folder.metrics)
    metrics.start({}, 0)
    try:
        yield metrics
    finally:
        metrics.end(None)


def _is_logged(learner: BankLearner, n_tokens: int, log_every: int) -> bool:
    is_last = learner.n_tokens_seen >= n_tokens
    return is_last or (learner.step_number - 1) % log_every == 0


def _records(
    learner: BankLearner, measured: Mapping[Key, Mapping[str, Tensor | float]], started: float
) -> Iterator[dict[str, Any]]:
    """What was measured in the step just made: a record for each dictionary."""
    position_now = {
        "step": learner.step_number,
        "n_tokens": learner.n_tokens_seen,
        "wall_seconds": round(time.perf_counter() - started, 3),
    }
    for key, terms in measured.items():
        name = dict(zip(("hook_name", "expansion_factor", "seed"), key, strict=True))
        yield {**position_now, **name, **{term: float(value) for term, value in terms.items()}}


def _restored(
    folder: RunFolder, learner: BankLearner, stream: ActivationStream, n_tokens: int
) -> TrainingBatches:
    """The batches to go on with, the learner set to its last checkpoint, if there is one."""
    checkpoint = folder.last_checkpoint()
    if checkpoint is None:
        return stream.batches(n_tokens)
    learner.restore(checkpoint.training)
    return stream.batches(n_tokens, (checkpoint.stream, checkpoint.stream_rows))


@contextmanager
def _saying_how_to_go_on(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"{what} could not be written ({error.strerror or error}). Checkpoints that were "
            "written before are whole: go on from the last with resume=True",
        ) from error


def _with_bar(
    batches: Iterable[Batch], n_tokens: int, n_done: int, progress: bool
) -> Iterator[Batch]:
    """The batches, counted on a progress bar once they have been used."""
    with progress_bar(
        total=n_tokens, initial=n_done, unit="tok", desc="training", shown=progress
    ) as bar:
        for batch in batches:
            yield batch
            bar.update(len(next(iter(batch.values()))))


def _described(key: Key, dictionary: Dictionary) -> dict[str, object]:
    hook_name, expansion_factor, seed = key
    widths = dictionary.origin.hook_widths
    return {
        "hook_name": hook_name,
        **({} if widths is None else {"hook_widths": widths}),
        "target_hook_name": dictionary.origin.target_hook_name,
        "expansion_factor": expansion_factor,
        "seed": seed,
        "architecture": dictionary.architecture,
        "config": asdict(dictionary.config),
    }
