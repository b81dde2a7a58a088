"""How a TopK step grows with the number of latents and with k: time and peak memory.

Every size has a process of its own, so that its peak memory is its own; the processes take turns
at one step each, so that their times are of the same minutes. All of them are in memory at once:
some 8 GB at the default sizes, less with --widths.

    python benchmarks/scaling.py --out benchmarks/results/scaling.csv

One row for each size, of the scan over d_sae and of the scan over k:

- scan: "d_sae" or "k", whichever varies.
- ms: median over the rounds of a step's time.
- us_per_latent: that over d_sae.
- per_latent_over_reference: median over the rounds of the time per latent over that of the
  reference size in the same round, 2^13 latents or k = 32 (the nearest if that is not measured).
- peak_mib: peak resident memory over what it was before the first weight was made, the
  libraries and batches being there already.
- weights_mib: what encoder and decoder take. The gradients and Adam's two means take as much
  each, so that four times this is what peak_mib cannot fall below.

Needs Linux, for the peak of a process that another one started.
"""

import multiprocessing
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import tyro
from contestants import Saefeat, Task
from machine import in_turn, ratio, seconds_of, where, write_row
from rows import structured_batches

REFERENCE = {"d_sae": 2**13, "k": 32}
"""The sizes that times per latent are compared with."""
DEVICE = torch.device("cpu")


@dataclass
class Options:
    out: Path = Path("scaling.csv")
    widths: tuple[int, ...] = tuple(2**exponent for exponent in range(11, 18))
    """Numbers of latents to measure, at k = 32."""
    ks: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
    """Numbers of latents on to measure, at 8,192 latents."""
    d_in: int = 576
    batch: int = 2048
    rounds: int = 9
    warm_up: int = 2
    """Rounds before those that count."""


@dataclass(frozen=True)
class Size:
    """What one process trains."""

    d_in: int
    d_sae: int
    k: int
    batch: int


class Worker:
    """A process that makes training steps of one size when it is told to."""

    def __init__(self, size: Size, n_threads: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.connection, other = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(other, size, n_threads), daemon=True)
        self.process.start()
        other.close()
        self.connection.recv()

    def step(self, number: int) -> float:
        """Seconds that a training step took, as the process itself measured them."""
        self.connection.send(number)
        seconds: float = self.connection.recv()
        return seconds

    def close(self) -> int:
        """Ends the process and gives its peak memory in bytes, above that before its weights."""
        self.connection.send(None)
        peak: int = self.connection.recv()
        self.process.join()
        return peak


def serve(connection: Connection, size: Size, n_threads: int) -> None:
    """What a `Worker`'s process does."""
    torch.set_num_threads(n_threads)
    # What torch loads at the first step of all is not the dictionary's.
    Saefeat(Task(kind="topk", batches=structured_batches(1, 64, 32), d_sae=64, k=8))(0)
    batches = structured_batches(2, size.batch, size.d_in)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is held now
    before = peak_bytes()
    task = Task(kind="topk", batches=batches, d_sae=size.d_sae, k=size.k)
    step = Saefeat(task)
    connection.send("ready")
    while (number := connection.recv()) is not None:
        connection.send(seconds_of(lambda number=number: step(number), DEVICE))
    connection.send(peak_bytes() - before)


def peak_bytes() -> int:
    """Peak resident memory of this process.

    Not `getrusage`, whose figure starts from the peak of the process that started this one.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no line VmHWM: is this a Linux kernel?")


def scan(name: str, sizes: Sequence[Size], options: Options) -> None:
    """Measure `sizes`, which differ in `name`."""
    workers = [Worker(size, torch.get_num_threads()) for size in sizes]
    seconds: list[list[float]] = [[] for _ in sizes]

    def turn(index: int, number: int) -> None:
        seconds[index].append(workers[index].step(number))

    in_turn(
        {
            str(index): lambda number, index=index: turn(index, number)
            for index in range(len(sizes))
        },
        rounds=options.rounds,
        warm_up=options.warm_up,
        device=DEVICE,
    )
    seconds = [taken[options.warm_up :] for taken in seconds]
    peaks = [worker.close() for worker in workers]
    per_latent = [
        [taken / size.d_sae for taken in row] for row, size in zip(seconds, sizes, strict=True)
    ]
    nearest = min(
        range(len(sizes)), key=lambda index: abs(getattr(sizes[index], name) - REFERENCE[name])
    )
    for size, taken, relative, peak in zip(sizes, seconds, per_latent, peaks, strict=True):
        row = {
            **where(DEVICE),
            "scan": name,
            "batch": size.batch,
            "d_in": size.d_in,
            "d_sae": size.d_sae,
            "k": size.k,
            "rounds": options.rounds,
            "ms": f"{1e3 * statistics.median(taken):.2f}",
            "us_per_latent": f"{1e6 * statistics.median(relative):.3f}",
            "per_latent_over_reference": f"{ratio(relative, per_latent[nearest]):.3f}",
            "peak_mib": round(peak / 2**20),
            "weights_mib": round(4 * 2 * size.d_in * size.d_sae / 2**20),
        }
        write_row(options.out, row)


def main(options: Options) -> None:
    d_in, batch = options.d_in, options.batch
    if options.widths:
        sizes = [Size(d_in, d_sae, REFERENCE["k"], batch) for d_sae in options.widths]
        scan("d_sae", sizes, options)
    if options.ks:
        scan("k", [Size(d_in, REFERENCE["d_sae"], k, batch) for k in options.ks], options)


if __name__ == "__main__":
    main(tyro.cli(Options))
