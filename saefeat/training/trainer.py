"""`train`: a bank of dictionaries from one pass over a stream."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from saefeat.activations.stream import ActivationStream
from saefeat.core.devices import fastest_dtype, resolve_device
from saefeat.core.files import claim_folder, write_json
from saefeat.dictionaries.base import Dictionary, DictionaryConfig
from saefeat.kernels.dispatch import choose_kernels
from saefeat.training.bank import Bank, Key
from saefeat.training.bank_learner import BankLearner
from saefeat.training.fitting import check_fit
from saefeat.training.loggers import MetricsFile
from saefeat.training.new_bank import blank_dictionaries, copies
from saefeat.training.requirements import Requirements


def train(
    stream: ActivationStream,
    config: DictionaryConfig | Bank,
    *,
    expansion_factors: Sequence[float] = (8,),
    seeds: Sequence[int] = (0,),
    targets: Mapping[str, str] | None = None,
    n_tokens: int,
    out: str | Path | None = None,
    device: str | torch.device = "auto",
    kernels: str = "auto",
    log_every: int = 10,
    progress: bool = True,
    check_memory: bool = True,
) -> Bank:
    """Train one dictionary for every hook, expansion factor and seed, all in the same pass.

    Every dictionary sees the same batches in the same order; a seed decides only its initial
    weights. With the same stream, seeds and machine the weights are bit-identical.

    Args:
        stream: Where the activations come from; only its training part is read.
        config: What kind of dictionary, and its recipe; or a bank to train further, by the
            recipes that its dictionaries hold. The bank itself stays as it is, and
            `expansion_factors`, `seeds` and `targets` are its own.
        expansion_factors: d_sae / d_in of each dictionary; fractions are fine.
        seeds: Seeds of the initial weights.
        targets: None trains a dictionary of every hook. {hook: other hook} trains transcoders
            instead, which read the one and predict the other: {"blocks.3.ln2.hook_out":
            "blocks.3.hook_mlp_out"}, say. Hooks that are no key train nothing.
        n_tokens: Rows of activations to learn from; more than the stream has means several
            epochs, each in a new order.
        out: A new folder for the run: `config.json` first, `metrics.jsonl` as it goes, and the
            dictionaries under `saes/` at the end. None keeps everything in memory.
        device: "auto" is CUDA where there is one.
        kernels: "auto", or a backend by name; the choice is written to `config.json`.
        log_every: Steps between records in `metrics.jsonl`.
        progress: Whether to draw a progress bar on standard error.
        check_memory: Whether to refuse, before anything is made, a run that will not fit in the
            memory or on the disk that are free; `plan` says what it would take.

    Returns:
        The dictionaries, reading raw activations (the scale of training is folded in).

    Raises:
        ValueError: An option is out of range, an activation is not finite, a hook is constant,
            or a loss stops being finite; hook and step are named. Or the run does not fit; an
            option with which it does is named.
        FileExistsError: `out` already holds files.
    """
    if n_tokens < 1 or log_every < 1:
        raise ValueError(
            f"n_tokens and log_every must be 1 or more, got {n_tokens} and {log_every}."
        )
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
            n_tokens=n_tokens,
            log_every=log_every,
            device=device,
        )
        check_fit(run_size, None if out is None else Path(out))
    dictionaries = (
        copies(stream, config)
        if isinstance(config, Bank)
        else blank_dictionaries(stream, config, expansion_factors, seeds, targets)
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
    if out is not None:
        out = claim_folder(Path(out))
        run = {
            "dictionaries": [_described(key, one) for key, one in dictionaries.items()],
            "trained_further": further,
            "model": stream.model_name,
            "hooks": {name: stream.widths[name] for name in stream.hooks},
            "n_tokens": n_tokens,
            "batch_size": stream.batch_size,
            "stream_seed": stream.seed,
            "device": str(device),
            "kernels": kernel_name,
            "selection_dtype": str(learner.selection_dtype).removeprefix("torch."),
            "torch": torch.__version__,
        }
        write_json(out / "config.json", run)
    started = time.perf_counter()
    with (
        _metrics_file(out) as metrics,
        tqdm(total=n_tokens, unit="tok", desc="training", disable=not progress) as bar,
    ):
        for batch in stream.batches(n_tokens):
            measured = learner.step(batch)
            bar.update(learner.n_tokens_seen - bar.n)
            last = learner.n_tokens_seen >= n_tokens
            if metrics and (last or (learner.step_number - 1) % log_every == 0):
                position = {
                    "step": learner.step_number,
                    "n_tokens": learner.n_tokens_seen,
                    "wall_seconds": round(time.perf_counter() - started, 3),
                }
                for (hook_name, expansion_factor, seed), terms in measured.items():
                    name = {
                        "hook_name": hook_name,
                        "expansion_factor": expansion_factor,
                        "seed": seed,
                    }
                    values = {term: float(value) for term, value in terms.items()}
                    metrics.write({**position, **name, **values})
    bank = learner.finish()
    if out is not None:
        bank.save(out / "saes")
    return bank


def _described(key: Key, dictionary: Dictionary) -> dict[str, object]:
    hook_name, expansion_factor, seed = key
    return {
        "hook_name": hook_name,
        "target_hook_name": dictionary.origin.target_hook_name,
        "expansion_factor": expansion_factor,
        "seed": seed,
        "architecture": dictionary.architecture,
        "config": asdict(dictionary.config),
    }


@contextmanager
def _metrics_file(out: Path | None) -> Iterator[MetricsFile | None]:
    if out is None:
        yield None
        return
    file = MetricsFile(out / "metrics.jsonl")
    try:
        yield file
    finally:
        file.close()
