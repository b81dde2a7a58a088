"""`train`: a bank of dictionaries from one pass over a stream."""

import copy
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
from saefeat.dictionaries.base import Dictionary, DictionaryConfig, Origin
from saefeat.dictionaries.registry import dictionary_type
from saefeat.kernels.dispatch import choose_kernels
from saefeat.training.bank import Bank, Key
from saefeat.training.bank_learner import BankLearner
from saefeat.training.loggers import MetricsFile


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

    Returns:
        The dictionaries, reading raw activations (the scale of training is folded in).

    Raises:
        ValueError: An option is out of range, an activation is not finite, a hook is constant,
            or a loss stops being finite; hook and step are named.
        FileExistsError: `out` already holds files.
    """
    if n_tokens < 1 or log_every < 1:
        raise ValueError(
            f"n_tokens and log_every must be 1 or more, got {n_tokens} and {log_every}."
        )
    device = resolve_device(device)
    kernel_name, backend = choose_kernels(kernels, device)
    further = isinstance(config, Bank)
    dictionaries = (
        _copies(stream, config)
        if isinstance(config, Bank)
        else _blank_dictionaries(stream, config, expansion_factors, seeds, targets)
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


def _copies(stream: ActivationStream, bank: Bank) -> dict[Key, Dictionary]:
    for key, dictionary in bank.items():
        for hook_name, width in (
            (key[0], dictionary.d_in),
            (bank.targets[key], dictionary.d_out),
        ):
            if stream.widths.get(hook_name) != width:
                raise ValueError(
                    f"The dictionary {key} has width {width} at {hook_name}, where the stream "
                    f"has {stream.widths.get(hook_name, 'nothing')}. Make the stream with the "
                    "hooks of the bank, on the model that it was trained on."
                )
    copies = {key: copy.deepcopy(one).float().requires_grad_(True) for key, one in bank.items()}
    for (hook_name, expansion_factor, seed), one in copies.items():
        one.with_origin(hook_name=hook_name, expansion_factor=expansion_factor, seed=seed)
    return copies


def _blank_dictionaries(
    stream: ActivationStream,
    config: DictionaryConfig,
    expansion_factors: Sequence[float],
    seeds: Sequence[int],
    targets: Mapping[str, str] | None,
) -> dict[Key, Dictionary]:
    for name, values in (("expansion_factors", expansion_factors), ("seeds", seeds)):
        if not values or len(set(values)) != len(values):
            raise ValueError(f"{name} must name each value once and at least one, got {values}.")
    for hook_name in {*(targets or {}).keys(), *(targets or {}).values()}:
        if hook_name not in stream.hooks:
            raise ValueError(
                f"targets names {hook_name!r}, which the stream does not read; it reads "
                f"{', '.join(stream.hooks)}. Make the stream with both hooks of each transcoder."
            )
    kind = dictionary_type(config)
    dictionaries = {}
    for hook_name in stream.hooks if targets is None else targets:
        target = None if targets is None else targets[hook_name]
        d_in = stream.widths[hook_name]
        for expansion_factor in expansion_factors:
            d_sae = round(expansion_factor * d_in)
            if d_sae < 1:
                raise ValueError(
                    f"Expansion factor {expansion_factor:g} gives {hook_name} (width {d_in}) "
                    f"{expansion_factor * d_in:g} latents. It must be at least {1 / d_in:.2g}."
                )
            for seed in seeds:
                origin = Origin(
                    hook_name=hook_name,
                    target_hook_name=target,
                    model_name=stream.model_name,
                    expansion_factor=expansion_factor,
                    seed=seed,
                    context_size=stream.context_size,
                    prepend_bos=stream.prepend_bos,
                )
                key = (hook_name, expansion_factor, seed)
                d_out = None if target is None else stream.widths[target]
                dictionaries[key] = kind(config, d_in, d_sae, origin, d_out)
    return dictionaries


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
