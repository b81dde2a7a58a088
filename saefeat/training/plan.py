"""`plan`: what a run will cost, before it begins."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from saefeat.activations.shuffle import ShuffleBuffer
from saefeat.activations.stream import ActivationStream
from saefeat.core import memory
from saefeat.core.devices import fastest_dtype, resolve_device
from saefeat.core.files import check_unclaimed
from saefeat.core.progress import progress_bar
from saefeat.dictionaries.base import Dictionary, DictionaryConfig
from saefeat.dictionaries.topk import TopKConfig
from saefeat.kernels.dispatch import Kernels, choose_kernels
from saefeat.training.bank import Bank, Key
from saefeat.training.bank_learner import BankLearner
from saefeat.training.fitting import check_fit, readable_bytes
from saefeat.training.new_bank import copies
from saefeat.training.requirements import Requirements

WARM_UP_CHUNKS, TIMED_CHUNKS = 1, 3
"""Chunks of the source that are read: first unmeasured, then timed. One more counts FLOPs."""
WARM_UP_STEPS, TIMED_STEPS = 1, 3
"""Steps after the first, which also initialises, that are made for each kind of hook."""

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a run will cost: sizes by arithmetic, times by a few steps on this machine."""

    n_dictionaries: int
    """Dictionaries that are trained at once."""
    n_parameters: int
    """Weights of all of them."""
    n_tokens: int
    """Rows of activations to train on."""
    n_steps: int
    """Steps of every dictionary."""
    language_model_flops: float
    """Of all forwards, as torch counts matrix products and attention; 0 without a model."""
    dictionary_flops: float
    """Of all steps; see `dictionaries.costs`."""
    activation_bytes: int
    """What flows through the stream. None of it is written to disk."""
    buffer_bytes: int
    """Of the shuffle buffer."""
    peak_host_bytes: int
    """Most memory that the process has at once; the sum of `host_parts`."""
    peak_device_bytes: int | None
    """Most memory in tensors on the CUDA device; None without one."""
    host_parts: dict[str, int]
    """Host memory by what it is for; "process and model" is there already."""
    device_parts: dict[str, int]
    """The same for the CUDA device."""
    disk_bytes: int
    """Of the run's folder, where there is one, with the checkpoints that it holds at once."""
    language_model_seconds: float
    """Expected time of reading and mixing all activations."""
    dictionary_seconds: float
    """Expected time of all steps."""
    device: str
    """Where the dictionaries are trained."""
    kernels: str
    """Backend of the sparse products."""

    @property
    def wall_seconds(self) -> float:
        """Expected time of the run."""
        return self.language_model_seconds + self.dictionary_seconds

    @property
    def summary(self) -> str:
        """The plan in a line."""
        device = (
            ""
            if self.peak_device_bytes is None
            else f" and {readable_bytes(self.peak_device_bytes)} on {self.device}"
        )
        return (
            f"Planned: {self.n_dictionaries:,} dictionaries in about "
            f"{readable_seconds(self.wall_seconds)}, {readable_bytes(self.peak_host_bytes)} of "
            f"memory{device}, {readable_bytes(self.disk_bytes)} of disk."
        )

    def to_dict(self) -> dict[str, object]:
        """All of it, ready for JSON."""
        return {**asdict(self), "wall_seconds": self.wall_seconds}

    def __str__(self) -> str:
        lines = [
            f"{self.n_dictionaries:,} dictionaries, {self.n_parameters:,} weights; "
            f"{self.n_tokens:,} tokens in {self.n_steps:,} steps on {self.device}",
            _line("wall time", readable_seconds(self.wall_seconds)),
            _line("  reading activations", readable_seconds(self.language_model_seconds)),
            _line("  training", readable_seconds(self.dictionary_seconds)),
            _line("FLOPs", f"{self.language_model_flops + self.dictionary_flops:.2e}"),
            _line("  language model", f"{self.language_model_flops:.2e}"),
            _line("  dictionaries", f"{self.dictionary_flops:.2e}"),
            _line("activations, not stored", readable_bytes(self.activation_bytes)),
            _line("disk", readable_bytes(self.disk_bytes)),
        ]
        peaks = (
            ("host memory", self.peak_host_bytes, self.host_parts),
            ("device memory", self.peak_device_bytes, self.device_parts),
        )
        for name, peak, parts in peaks:
            if peak is not None:
                lines.append(_line(name, readable_bytes(peak)))
                lines += [_line(f"  {part}", readable_bytes(n)) for part, n in parts.items()]
        return "\n".join(lines)


def plan(
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
    log_every: int = 10,
    progress: bool = True,
) -> Plan:
    """What `train` will cost with the same arguments; nothing is written.

    Whether it fits is worked out first, from sizes alone. Then a few chunks of activations are
    read and a few steps made, of one hook for each width and set of dictionaries, and their
    median time stands for all. Penalised kinds, whose number of latents on moves during a run,
    are timed as they start.

    Args:
        stream: Where the activations come from.
        config: As for `train`.
        expansion_factors: As for `train`.
        seeds: As for `train`.
        targets: As for `train`.
        groups: As for `train`.
        n_tokens: As for `train`.
        out: The folder that the run would make; None where it writes nothing.
        device: As for `train`.
        kernels: As for `train`.
        checkpoint_every: As for `train`.
        keep_last: As for `train`.
        log_every: As for `train`.
        progress: Whether to draw a progress bar on standard error.

    Raises:
        ValueError: An option is out of range, or the run does not fit in memory or on the disk;
            the message names an option with which it does.
        FileExistsError: `out` already holds files.
    """
    if n_tokens < 1 or log_every < 1:
        raise ValueError(
            f"n_tokens and log_every must be 1 or more, got {n_tokens} and {log_every}."
        )
    device = resolve_device(device)
    kernel_name, backend = choose_kernels(kernels, device)
    run = Requirements.of(
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
    if out is not None:
        check_unclaimed(out)
    check_fit(run, None if out is None else Path(out))
    load_libraries(device, backend)
    host_parts = {"process and model": memory.process_bytes(), **run.host_parts}
    device_parts = run.device_parts
    if device_parts:
        device_parts = {"model": memory.device_bytes(device), **device_parts}
    alike = hooks_alike(run)
    dictionary_seconds = 0.0
    with progress_bar(total=1 + len(alike), unit="part", desc="planning", shown=progress) as bar:
        chunks, seconds_per_row, flops_per_row = measure_reading(stream)
        bar.update()
        rows = rows_of(chunks, stream.batch_size)
        for dictionaries, n_hooks in alike:
            learner = BankLearner(
                copies(stream, Bank(dictionaries))
                if isinstance(config, Bank)
                else blank_like(dictionaries),
                trained=isinstance(config, Bank),
                n_tokens=n_tokens,
                n_steps=run.n_steps,
                device=device,
                kernels=backend,
                selection_dtype=fastest_dtype(device),
            )
            first, step = measure_steps(learner, rows, device)
            dictionary_seconds += n_hooks * (first + step * n_tokens / stream.batch_size)
            # What it took is for the next one, and in the end for the run.
            del learner
            memory.give_back_freed()
            bar.update()
    flops_per_step = sum(one.step_flops(stream.batch_size) for one in run.dictionaries.values())
    return Plan(
        n_dictionaries=len(run.dictionaries),
        n_parameters=run.n_parameters,
        n_tokens=n_tokens,
        n_steps=run.n_steps,
        language_model_flops=flops_per_row * n_tokens,
        dictionary_flops=flops_per_step * n_tokens / stream.batch_size,
        activation_bytes=run.activation_bytes,
        buffer_bytes=stream.buffer_bytes,
        peak_host_bytes=sum(host_parts.values()),
        peak_device_bytes=sum(device_parts.values()) if device_parts else None,
        host_parts=host_parts,
        device_parts=device_parts,
        disk_bytes=run.disk_bytes,
        language_model_seconds=seconds_per_row * n_tokens,
        dictionary_seconds=dictionary_seconds,
        device=str(device),
        kernels=kernel_name,
    )


def timed(function: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """What a call returns, and the seconds it takes, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - began


def measure_reading(stream: ActivationStream) -> tuple[list[dict[str, Tensor]], float, float]:
    """The first chunks of a stream, and the seconds and FLOPs of a row, mixing included."""
    chunks: list[dict[str, Tensor]] = []
    seconds: list[float] = []
    source = stream.sample_chunks(WARM_UP_CHUNKS + TIMED_CHUNKS)
    buffer = ShuffleBuffer(2 * stream.chunk_rows)
    generator = np.random.default_rng(stream.seed)

    def read_and_mix() -> dict[str, Tensor] | None:
        chunk = next(source, None)
        if chunk is not None:
            buffer.add(chunk)
            buffer.take(n_rows_of(chunk), generator)
        return chunk

    while True:
        chunk, taken = timed(read_and_mix, stream.device)
        if chunk is None:
            break
        chunks.append(chunk)
        seconds.append(taken / n_rows_of(chunk))
    if not chunks:
        raise ValueError("The text gave no rows to train on: no position of it counts.")
    flops = 0.0
    if stream.context_size is not None:
        with FlopCounterMode(display=False) as counter:
            (counted,) = stream.sample_chunks(1)
        flops = counter.get_total_flops() / n_rows_of(counted)
    return chunks, statistics.median(seconds[WARM_UP_CHUNKS:] or seconds), flops


def measure_steps(
    learner: BankLearner, rows: Mapping[str, Tensor], device: torch.device
) -> tuple[float, float]:
    """Seconds that the first step takes beyond the others, and seconds of one of those."""
    _, first = timed(lambda: learner.step(rows), device)
    for _ in range(WARM_UP_STEPS):
        learner.step(rows)
    steps = [timed(lambda: learner.step(rows), device)[1] for _ in range(TIMED_STEPS)]
    step = statistics.median(steps)
    return max(0.0, first - step), step


def hooks_alike(run: Requirements) -> list[tuple[dict[Key, Dictionary], int]]:
    """The dictionaries of one hook for each set of shapes and recipes, and how many have it."""
    found: dict[object, tuple[dict[Key, Dictionary], int]] = {}
    for dictionaries in run.by_hook.values():
        shapes = tuple(
            (one.config, one.d_in, one.d_sae, one.d_out) for one in dictionaries.values()
        )
        first, n_hooks = found.get(shapes, (dictionaries, 0))
        found[shapes] = (first, n_hooks + 1)
    return list(found.values())


def blank_like(dictionaries: Mapping[Key, Dictionary]) -> dict[Key, Dictionary]:
    """Dictionaries in memory, where those given are shapes alone."""
    return {
        key: type(one)(
            one.config, one.d_in, one.d_sae, one.origin, one.d_out if one.is_transcoder else None
        )
        for key, one in dictionaries.items()
    }


def rows_of(chunks: Sequence[Mapping[str, Tensor]], n_rows: int) -> dict[str, Tensor]:
    """A batch of `n_rows` rows out of chunks, repeated where they are too few."""
    rows = {hook: torch.cat([chunk[hook] for chunk in chunks]) for hook in chunks[0]}
    n_found = n_rows_of(rows)
    places = torch.arange(n_rows) % n_found
    return {hook: x.index_select(0, places.to(x.device)) for hook, x in rows.items()}


def n_rows_of(rows: Mapping[str, Tensor]) -> int:
    """Rows of a chunk or batch."""
    return len(next(iter(rows.values())))


def load_libraries(device: torch.device, kernels: Kernels) -> None:
    """Make a step of a tiny dictionary, after which the process holds all code of a run."""
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    one = TopKConfig(k=2)
    stream = ActivationStream.from_tensors({"x": x}, batch_size=32)
    run = Requirements.of(
        stream,
        one,
        expansion_factors=(2,),
        seeds=(0,),
        targets=None,
        groups=None,
        n_tokens=32,
        log_every=1,
        checkpoint_every=1,
        keep_last=1,
        device=device,
    )
    learner = BankLearner(
        blank_like(run.dictionaries),
        n_tokens=32,
        n_steps=1,
        device=device,
        kernels=kernels,
        selection_dtype=fastest_dtype(device),
    )
    learner.step(next(iter(stream)))


def readable_seconds(seconds: float) -> str:
    """5400 as "1.5 hours"."""
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.2g} seconds"


def _line(name: str, value: str) -> str:
    return f"{name:<30}{value:>16}"
