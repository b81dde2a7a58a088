"""Whether a run fits on this machine, and which option would make it fit."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, count
from pathlib import Path

from saefeat.core import memory
from saefeat.dictionaries.base import Dictionary
from saefeat.training.bank import Bank, Key
from saefeat.training.requirements import BATCHES, BUFFER, SCORES, WEIGHTS, Requirements

Option = Callable[[Requirements], Iterator[tuple[str, Requirements]]]
"""Ever smaller runs, each with the words for what was changed."""


def check_fit(
    run: Requirements,
    out: Path | None,
    n_processes: int = 1,
    of_all: Requirements | None = None,
) -> None:
    """Refuse a run that is larger than what is free of memory or disk.

    Args:
        run: The run.
        out: Its folder; None where nothing is written.
        n_processes: How many on this machine are to run it together, each with memory of its own.
        of_all: The run of all processes, which write to one disk, where `run` is a share of it.

    Raises:
        ValueError: It does not fit. The message says by how much, and which option would help.
    """
    host_bytes = memory.available_host_bytes() // n_processes
    places = [("host memory", run.host_parts, host_bytes)]
    for_each = f" for each of {n_processes} processes" if n_processes > 1 else ""
    if run.device_parts:
        device = run.device if run.device.type == "cuda" else run.stream_device
        places.append((f"memory on {device}", run.device_parts, _device_limit(run)))
    for place, parts, available in places:
        needed = sum(parts.values())
        if needed > available:
            largest = max(parts, key=lambda part: parts[part])
            raise ValueError(
                f"The run would take {readable_bytes(needed)} of {place}, the largest part for "
                f"{largest} ({readable_bytes(parts[largest])}), and {readable_bytes(available)} "
                f"are free{for_each}. "
                f"{_advice(run, _OPTIONS[largest], partial(_fits_memory, n_processes=n_processes))}"
            )
    run = of_all or run
    if out is not None and run.disk_bytes > (free := memory.available_disk_bytes(out)):
        advice = _advice(
            run,
            (_longer_between_records, _smaller_dictionaries, *_PARTS_OF_BANK),
            lambda other: other.disk_bytes <= free,
        )
        raise ValueError(
            f"The run would write {readable_bytes(run.disk_bytes)} to {out}, where "
            f"{readable_bytes(free)} are free. {advice} Or choose another disk."
        )


def readable_bytes(n_bytes: float) -> str:
    """1,500,000 as "1.5 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n_bytes) < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.3g} TB" if n_bytes < 1000 else f"{n_bytes:,.0f} TB"


def _device_limit(run: Requirements) -> int:
    device = run.device if run.device.type == "cuda" else run.stream_device
    return memory.available_device_bytes(device)


def _fits_memory(run: Requirements, n_processes: int) -> bool:
    return sum(run.host_parts.values()) <= memory.available_host_bytes() // n_processes and (
        not run.device_parts or sum(run.device_parts.values()) <= _device_limit(run)
    )


def _advice(
    run: Requirements, options: tuple[Option, ...], fits: Callable[[Requirements], bool]
) -> str:
    """The first option that suffices; else two of them, the one as far as it goes."""
    for option in options:
        for words, smaller in option(run):
            if fits(smaller):
                return f"It fits with {words}."
    for option in options:
        steps = list(option(run))
        for other in options if steps else ():
            words, smallest = steps[-1]
            for more_words, smaller in other(smallest) if other is not option else ():
                if fits(smaller):
                    return f"It fits with {words} and {more_words}."
    return "No option makes it fit: it takes a smaller model or a larger machine."


def _power_of_two_below(number: int) -> int:
    """512 for 1024, and for 600."""
    return 1 << (number - 1).bit_length() >> 1


def _smaller_batches(run: Requirements) -> Iterator[tuple[str, Requirements]]:
    batch_size = _power_of_two_below(run.batch_size)
    while batch_size >= 16:
        smaller = replace(run, batch_size=batch_size)
        if not run.is_text:  # tensors are read by the batch
            smaller = replace(smaller, buffer_rows=batch_size, chunk_rows=batch_size)
        yield f"batch_size={batch_size}", smaller
        batch_size //= 2


def _smaller_buffer(run: Requirements) -> Iterator[tuple[str, Requirements]]:
    buffer_rows = _power_of_two_below(run.buffer_rows)
    while run.is_text and buffer_rows >= run.batch_size:
        yield f"buffer_rows={buffer_rows}", replace(run, buffer_rows=buffer_rows)
        buffer_rows //= 2


def _smaller_dictionaries(run: Requirements) -> Iterator[tuple[str, Requirements]]:
    if run.remake is None:
        return
    factors = list(dict.fromkeys(key[1] for key in run.dictionaries))
    caps = sorted(factors)[-2::-1] if len(factors) > 1 else []
    halved = (min(factors) / 2**halvings for halvings in count(1))
    for cap in chain(caps, halved):
        kept = [factor for factor in factors if factor <= cap] or [cap]
        try:
            dictionaries = run.remake(kept)
        except ValueError:  # fewer latents than the kind needs
            return
        yield (
            f"expansion_factors={kept}",
            replace(run, dictionaries=dictionaries),
        )


def _part_of_bank(index: int, what: str) -> Option:
    """An option that trains a few hooks, widths or seeds at a time, in several runs."""

    def fewer(run: Requirements) -> Iterator[tuple[str, Requirements]]:
        values = list(dict.fromkeys(key[index] for key in run.dictionaries))
        for n_values in range(len(values) - 1, 0, -1):
            runs = [
                _restricted(run, index, set(values[start : start + n_values]))
                for start in range(0, len(values), n_values)
            ]
            largest = max(
                runs, key=lambda one: sum(one.host_parts.values()) + sum(one.device_parts.values())
            )
            yield f"{n_values} of the {len(values)} {what} at a time, in several runs", largest

    return fewer


def _restricted(run: Requirements, index: int, values: set[object]) -> Requirements:
    kept = {key: one for key, one in run.dictionaries.items() if key[index] in values}
    bank = Bank(kept)
    hooks = {*bank.hooks, *bank.targets.values()}

    remake = run.remake

    def remade(factors: Sequence[float]) -> dict[Key, Dictionary]:
        made = {} if remake is None else remake(factors)
        # Widths are what is remade; of hooks and seeds only those that are kept.
        return {key: one for key, one in made.items() if index == 1 or key[index] in values}

    return replace(
        run,
        dictionaries=kept,
        remake=None if remake is None else remade,
        row_bytes={hook: size for hook, size in run.row_bytes.items() if hook in hooks},
    )


def _longer_between_records(run: Requirements) -> Iterator[tuple[str, Requirements]]:
    log_every = 10 * run.log_every
    while log_every < 10 * run.n_steps:
        yield f"log_every={log_every}", replace(run, log_every=log_every)
        log_every *= 10


_PARTS_OF_BANK = (
    _part_of_bank(0, "hooks"),
    _part_of_bank(2, "seeds"),
    _part_of_bank(1, "expansion factors"),
)

_OPTIONS: dict[str, tuple[Option, ...]] = {
    BUFFER: (_smaller_buffer, *_PARTS_OF_BANK, _smaller_batches, _smaller_dictionaries),
    WEIGHTS: (*_PARTS_OF_BANK, _smaller_dictionaries, _smaller_batches, _smaller_buffer),
    SCORES: (_smaller_batches, _smaller_dictionaries, *_PARTS_OF_BANK, _smaller_buffer),
    BATCHES: (_smaller_batches, *_PARTS_OF_BANK, _smaller_dictionaries, _smaller_buffer),
}
"""What to try, in turn, where a part is the largest. What trains the same dictionaries in several
runs comes before what trains smaller ones."""
