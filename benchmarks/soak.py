"""Whether memory and open files stay where they are while a process does the same for half an hour.

One turn: activations are stored, dictionaries of three kinds trained on them with checkpoints, one
run killed and gone on with, all measured, saved and opened again, and everything deleted. What a
turn needs only for a moment is not seen; what it leaves behind is.

    python benchmarks/soak.py --minutes 30 --out benchmarks/results/soak.csv

- turn: how many had been made. The first two warm up: caches, compiled loops, pools of threads.
- resident_megabytes: memory of the process after the turn, freed blocks given back.
- open_files: file handles, sockets and pipes. running_threads: those of Python.

`results/soak.csv` is from half an hour on a busy machine, 68 turns: 756.1 to 757.0 MB after warming
up, 8 files, 2 threads, flat.

A line at the end says whether they are flat: no more handles or threads than after warming up, and
memory that rises by less than 2 % from the median of the second quarter to that of the last.
"""

import gc
import shutil
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from machine import where, write_row
from rows import structured_batches

import saefeat as sf
from saefeat.core.memory import give_back_freed, process_bytes

WARM_UP = 2
"""Turns that do not count."""


@dataclass
class Options:
    out: Path = Path("soak.csv")
    minutes: float = 30
    d_in: int = 64
    batch: int = 512


class Stop(sf.Callback):
    """Ends a run in its middle."""

    def record(self, record: object) -> None:
        raise RuntimeError("as if it had been killed")


def turn(stream: sf.ActivationStream, folder: Path) -> None:
    sf.cache_activations(stream, folder / "acts", dtype="int8", progress=False)
    stored = sf.ActivationStream.from_store(folder / "acts", batch_size=stream.batch_size)
    for config in (sf.TopKConfig(k=8), sf.MatchingPursuitConfig(k=4), sf.JumpReLUConfig()):
        out = folder / type(config).__name__

        def train(*callbacks: sf.Callback, config: object = config, out: Path = out) -> sf.Bank:
            return sf.train(
                stored,
                config,
                expansion_factors=[2, 4],
                n_tokens=20 * stored.batch_size,
                out=out,
                checkpoint_every=5,
                resume=True,
                progress=False,
                callbacks=callbacks,
            )

        try:
            train(Stop())
        except RuntimeError:
            bank = train()
        sf.measure(bank, stored, n_tokens=2000, progress=False).save(out / "report")
        assert str(sf.Report.load(out / "report"))
        assert len(sf.Bank.load(out)) == len(bank)


def main(options: Options) -> None:
    device = torch.device("cpu")
    rows = torch.cat(structured_batches(8, options.batch, options.d_in))
    stream = sf.ActivationStream.from_tensors({"x": rows}, batch_size=options.batch)
    measured: list[dict[str, float]] = []
    started = time.monotonic()
    n_turns = 0
    while time.monotonic() - started < 60 * options.minutes or n_turns < WARM_UP + 4:
        folder = Path(tempfile.mkdtemp())
        turn(stream, folder)
        shutil.rmtree(folder)
        gc.collect()
        give_back_freed()
        n_turns += 1
        now = {
            "turn": n_turns,
            "minutes": round((time.monotonic() - started) / 60, 2),
            "resident_megabytes": round(process_bytes() / 1e6, 1),
            "open_files": len(list(Path("/proc/self/fd").iterdir())),
            "running_threads": threading.active_count(),
        }
        write_row(options.out, {**where(device), **now})
        measured.append(now)
    print(verdict(measured[WARM_UP:]))


def verdict(measured: list[dict[str, float]]) -> str:
    """Whether what was measured after warming up stays as it is."""
    quarter = max(1, len(measured) // 4)
    memory = [one["resident_megabytes"] for one in measured]
    early = statistics.median(memory[quarter : 2 * quarter])
    late = statistics.median(memory[-quarter:])
    handles = {
        name: (int(measured[0][name]), int(measured[-1][name]))
        for name in ("open_files", "running_threads")
    }
    is_flat = late < 1.02 * early and all(last <= first for first, last in handles.values())
    return (
        f"{'flat' if is_flat else 'NOT FLAT'}: {early:.1f} to {late:.1f} MB, first and last "
        f"{handles}, {len(measured)} turns after warming up"
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
