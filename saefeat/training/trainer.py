"""`train`: a bank of dictionaries from one pass over a stream."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch

from saefeat.activations.stream import ActivationStream
from saefeat.core import distributed
from saefeat.core.devices import fastest_dtype, resolve_device
from saefeat.dictionaries.base import Dictionary, DictionaryConfig
from saefeat.kernels.dispatch import choose_kernels
from saefeat.training.bank import Bank, Key
from saefeat.training.bank_learner import BankLearner
from saefeat.training.callbacks import Callback, Listeners
from saefeat.training.fitting import check_fit
from saefeat.training.new_bank import blank_dictionaries, copies
from saefeat.training.requirements import Requirements
from saefeat.training.run import Run
from saefeat.training.run_folder import RunFolder
from saefeat.training.sharded_bank import ShardedBankLearner, own_dictionaries, sent
from saefeat.training.sharded_features import FeatureShardedLearner, shard_of


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
    parallel: Literal["data", "bank", "features"] = "data",
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
            memory. Several processes need it on a disk that all of them have.
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
        parallel: What the processes of torch.distributed divide, if there are several; all of
            them call this with the same arguments; the first writes, but for checkpoints, of
            which each writes what it alone has. "data" divides the
            rows of every batch: all learn the same, as one process would from whole batches, up
            to the order of sums. "bank" divides the dictionaries, to the same bits as one
            process. "features" divides the latents of every dictionary, TopK or BatchTopK, for
            those too wide for one process: the same up to the order of sums. In each a language
            model reads a share of the text for all.

    Returns:
        The dictionaries, reading raw activations (the scale of training is folded in).

    Raises:
        ValueError: An option is out of range, an activation is not finite, a hook is constant,
            or a loss stops being finite; hook and step are named. Or the run does not fit; an
            option with which it does is named.
        FileExistsError: `out` already holds files, and `resume` is not set.
        BlockingIOError: Another process is writing to `out`.
        PeerLostError: One of several processes has ended or hangs, so that all end.
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
    if parallel not in ("data", "bank", "features"):
        raise ValueError(f"parallel must be 'data', 'bank' or 'features', got {parallel!r}.")
    ranks = distributed.current()
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
        own_size = run_size
        if parallel in ("bank", "features") and ranks.size > 1:
            mine = _own_part(run_size.dictionaries, parallel, ranks)
            own_size = replace(run_size, dictionaries=mine, remake=None)
        n_here = distributed.processes_here() if ranks.size > 1 else 1
        check_fit(own_size, None if out is None else Path(out), n_here, of_all=run_size)
    dictionaries = (
        copies(stream, config)
        if isinstance(config, Bank)
        else blank_dictionaries(stream, config, expansion_factors, seeds, targets, groups)
    )
    options: dict[str, Any] = {
        "trained": further,
        "n_tokens": n_tokens,
        "n_steps": math.ceil(n_tokens / stream.batch_size),
        "device": device,
        "kernels": backend,
        "selection_dtype": fastest_dtype(device),
    }
    sharded = {"bank": ShardedBankLearner, "features": FeatureShardedLearner}
    learner: BankLearner = (
        sharded[parallel](dictionaries, peers=ranks, **options)
        if parallel in sharded and ranks.size > 1
        else BankLearner(dictionaries, ranks=ranks, **options)
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
        "processes": ranks.size,
        "parallel": parallel if ranks.size > 1 else None,
        "torch": torch.__version__,
        "notes": dict(notes or {}),
    }
    _check_all_ask_the_same(description, ranks)
    listeners = Listeners(callbacks if ranks.is_first else ())
    run = Run(
        learner,
        stream,
        listeners,
        description,
        n_tokens=n_tokens,
        log_every=log_every,
        progress=progress,
        is_heard=bool(callbacks),
        ranks=ranks,
    )
    if out is None:
        return run.in_memory()
    path = Path(out)
    folder = ranks.on_first(lambda: RunFolder(path, description, resume=resume))
    try:
        if ranks.told(folder is not None and folder.is_finished):
            ended = ranks.on_first(lambda: Bank.load(path))
            return Bank(
                {
                    key: sent(None if ended is None else ended[key], 0, blank, ranks)
                    for key, blank in dictionaries.items()
                }
            )
        return run.in_folder(folder, path, checkpoint_every=checkpoint_every, keep_last=keep_last)
    finally:
        listeners.end(None)
        if folder is not None:
            folder.close()


def _own_part(
    dictionaries: Mapping[Key, Dictionary], parallel: str, ranks: distributed.Ranks
) -> dict[Key, Dictionary]:
    """What this process holds of a bank, by shape."""
    if parallel == "bank":
        return own_dictionaries(dictionaries, ranks)
    with torch.device("meta"):
        return {key: shard_of(one, ranks) for key, one in dictionaries.items()}


def _check_all_ask_the_same(description: Mapping[str, Any], ranks: distributed.Ranks) -> None:
    """Refuse processes that were asked for different runs, before they train different things."""
    asked = {
        name: json.dumps(value)
        for name, value in description.items()
        if name not in ("torch", "threads", "notes")
    }
    first = ranks.told(asked)
    differing_here = [name for name, value in asked.items() if first[name] != value]
    for rank, differing in enumerate(ranks.each(differing_here)):
        if differing:
            raise ValueError(
                f"Process {rank} was asked for another run than the first: its {differing[0]} "
                "differs. All call train with the same arguments and equal streams."
            )


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
