"""What checkpoints cost: the share of a run that goes into writing them, at the default interval.

One TopK dictionary learns from rows in memory, which is where checkpoints weigh most: a language
model's pass would make the steps between them longer, though a live stream's shuffle buffer makes
them larger. Every `save_checkpoint` of the run is timed where the run calls it.

    python benchmarks/checkpoint.py --out benchmarks/results/checkpoint.csv

- share: seconds in checkpoints over seconds of the run.
- megabytes: of the last checkpoint.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from machine import where, write_row
from rows import structured_batches

import saefeat as sf
from saefeat.training import run as training_run


@dataclass
class Options:
    out: Path = Path("checkpoint.csv")
    d_in: int = 576
    expansion_factor: float = 8
    batch: int = 4096
    steps: int = 1000
    every: int = 500
    """Steps between checkpoints; the default of `sf.train`."""


def main(options: Options) -> None:
    rows = torch.cat(structured_batches(8, options.batch, options.d_in))
    stream = sf.ActivationStream.from_tensors({"x": rows}, batch_size=options.batch)
    plain, seconds = training_run.save_checkpoint, []

    def timed(*arguments: Any, **named: Any) -> Path:
        started = time.perf_counter()
        path = plain(*arguments, **named)
        seconds.append(time.perf_counter() - started)
        return path

    training_run.save_checkpoint = timed
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        sf.train(
            stream,
            sf.TopKConfig(k=32),
            expansion_factors=[options.expansion_factor],
            # One step more, since the end of a run writes no checkpoint.
            n_tokens=(options.steps + 1) * options.batch,
            out=Path(folder) / "run",
            checkpoint_every=options.every,
            progress=False,
        )
        run_seconds = time.perf_counter() - started
        newest = max((Path(folder) / "run" / "checkpoints").iterdir())
        n_bytes = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    row = {
        **where(torch.device("cpu")),
        "d_in": options.d_in,
        "d_sae": round(options.expansion_factor * options.d_in),
        "batch": options.batch,
        "steps": options.steps,
        "every": options.every,
        "checkpoints": len(seconds),
        "run_seconds": f"{run_seconds:.1f}",
        "checkpoint_seconds": f"{sum(seconds):.2f}",
        "share": f"{sum(seconds) / run_seconds:.4f}",
        "megabytes": f"{n_bytes / 1e6:.0f}",
    }
    write_row(options.out, row)


if __name__ == "__main__":
    main(tyro.cli(Options))
