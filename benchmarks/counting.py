"""Is the count of features right? Synthetic layers whose features are known, counted blind.

    python benchmarks/counting.py --out benchmarks/results/counting.csv

One row for each cell of the grid; a cell that the CSV has already is left out, so that a run that
was stopped goes on when the command is given again. `--fast` counts a dozen cells in less than ten
minutes. Cells take turns in an order that mixes sizes, so that a part of the grid is a sample of
it. Each of the `--processes` has one thread.

- d_in, features_per_neuron, density, distribution, structure, noise, seed: the layer.
- twice_load: 2 sum_i p_i ln(1/p_i) / d_in of the true densities.
- n_features: how many there are.
- estimate, low, high, coverage, identifiable, measured_twice_load: the answer.
- shared_energy, n_strict, chao2, half: what it was made of. In older rows of the committed file
  half may be of the picks that were not gone on with; their intervals are by the rule of now.
- recall: share of the features that a counted direction has a cosine of at least 0.9 with.
- sae_*: what BatchTopK SAEs with twice as many latents as features count, after four times as
  many rows; they are told how many features there are and how many are on. Empty but for
  independent features of equal density, the ones in the map.
- seconds: of the count. The committed file is of a machine that had other work.
"""

import csv
import itertools
import multiprocessing
import random
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import tyro
from machine import where, write_row
from tqdm import tqdm

import saefeat as sf

CORRELATION = 0.3
CHILDREN = 0.5
SAE_ROWS = 4
"""Rows that SAEs learn from, over those of the count."""
KINDS = (
    "constant-independent",
    "constant-correlated",
    "zipf-independent",
    "zipf-correlated",
    "zipf-hierarchical",
)
SAE_COLUMNS = (
    "alive",
    "effective",
    "stable",
    "distinct",
    "chao2",
    "coverage",
    "fvu",
    "recall",
    "seconds",
)


@dataclass
class Options:
    out: Path = Path("counting.csv")
    widths: tuple[int, ...] = (32, 48, 96)
    degrees: tuple[int, ...] = (1, 2, 4, 8, 12)
    """Features per neuron."""
    densities: tuple[float, ...] = (0.003, 0.01, 0.03)
    kinds: tuple[str, ...] = KINDS
    """Distribution and structure of the densities."""
    noises: tuple[float, ...] = (0.0, 0.05)
    seeds: tuple[int, ...] = (0,)
    rows_at_32: int = 500_000
    """Rows of the last fits in 32 dimensions; more in proportion to the width's square root."""
    fast: bool = False
    """A dozen cells, in less than ten minutes on two cores."""
    saes: bool = True
    """Whether to count with SAEs too."""
    processes: int = 2
    minutes: float = float("inf")
    """Begin no cell after this time."""


@dataclass(frozen=True)
class Cell:
    d_in: int
    features_per_neuron: int
    density: float
    distribution: str
    structure: str
    noise: float
    seed: int


def grid(options: Options) -> list[Cell]:
    """All cells, in an order that is mixed but always the same."""
    cells = [
        Cell(d_in, degree, density, *kind.split("-"), noise, seed)
        for d_in, degree, density, kind, noise, seed in itertools.product(
            options.widths,
            options.degrees,
            options.densities,
            options.kinds,
            options.noises,
            options.seeds,
        )
    ]
    cells = [cell for cell in cells if is_possible(cell)]
    random.Random(0).shuffle(cells)
    if options.fast:
        cells = [cell for cell in cells if cell.d_in == min(options.widths)][:12]
    return cells


def is_possible(cell: Cell) -> bool:
    """Whether no density would be above 1, as those of a dense Zipf law are."""
    try:
        truth_of(cell)
    except ValueError:
        return False
    return True


def truth_of(cell: Cell) -> sf.SyntheticActivations:
    """The layer of a cell."""
    return sf.SyntheticActivations(
        n_features=cell.features_per_neuron * cell.d_in,
        d_in=cell.d_in,
        density=cell.density,
        density_distribution=cell.distribution,
        noise=cell.noise,
        correlation=CORRELATION if cell.structure == "correlated" else 0.0,
        hierarchy=CHILDREN if cell.structure == "hierarchical" else 0.0,
        seed=cell.seed,
    )


def counted(cell: Cell, options: Options) -> dict[str, Any]:
    """The row of a cell."""
    torch.set_num_threads(1)
    truth = truth_of(cell)
    n_rows = round(options.rows_at_32 * (cell.d_in / 32) ** 0.5)
    stream = truth.stream(batch_size=512)
    start = time.perf_counter()
    count = sf.count_features(stream, n_tokens=n_rows, saes=False, progress=False)
    seconds = time.perf_counter() - start
    last = count.last_step
    halves = [step for step in count.steps if step.stage == "half"][-2:]
    half = max(halves, key=lambda step: step.shared_energy).n_features if halves else ""
    row: dict[str, Any] = {
        **asdict(cell),
        "twice_load": round(2 * sf.superposition.load(truth.densities, n_neurons=cell.d_in), 4),
        "n_features": truth.n_features,
        "estimate": round(count.estimate, 1),
        "low": round(count.low, 1),
        "high": round(count.high, 1),
        "coverage": round(count.coverage, 4),
        "identifiable": count.identifiable,
        "measured_twice_load": round(2 * count.load, 4),
        "shared_energy": round(last.shared_energy, 4),
        "n_strict": last.n_strict,
        "chao2": round(last.chao2, 1),
        "half": half,
        "atoms": last.d_sae,
        "picks": last.picks,
        "n_rows": count.n_tokens,
        "recall": round(recall(count.directions, truth.directions), 4),
        "seconds": round(seconds, 1),
    }
    saes = dict.fromkeys(SAE_COLUMNS, "")
    if options.saes and (cell.distribution, cell.structure) == ("constant", "independent"):
        saes = sae_columns(truth, stream, n_rows)
    return row | {f"sae_{name}": value for name, value in saes.items()}


def sae_columns(
    truth: sf.SyntheticActivations, stream: sf.ActivationStream, n_rows: int
) -> dict[str, Any]:
    """What SAEs count that know how many features there are and how many are on."""
    from saefeat.superposition.sae_counts import count_recipe

    start = time.perf_counter()
    bank = sf.train(
        stream,
        count_recipe(max(1, round(truth.l0))),
        expansion_factors=[2 * truth.n_features / truth.d_in],
        seeds=(0, 1, 2),
        n_tokens=SAE_ROWS * n_rows,
        progress=False,
    )
    (counts,) = sf.sae_counts(bank, stream, n_tokens=30_000, progress=False)
    first = next(iter(bank.values()))
    values = (
        round(sum(counts.alive.per_seed) / 3),
        round(sum(counts.effective) / 3),
        counts.alive.n_stable,
        counts.distinct.n_stable,
        round(counts.distinct.chao2),
        round(counts.distinct.coverage or 0, 4),
        round(sum(counts.fvu) / 3, 4),
        round(recall(first.W_dec, truth.directions), 4),
        round(time.perf_counter() - start, 1),
    )
    return dict(zip(SAE_COLUMNS, values, strict=True))


def recall(found: torch.Tensor, true: torch.Tensor) -> float:
    """Share of the true directions that one of those found has a cosine of 0.9 with."""
    if len(found) == 0:
        return 0.0
    return sf.metrics.match_features(found.float(), true).recall()


def cells_of(path: Path) -> set[Cell]:
    """The cells that a CSV has."""
    if not path.is_file():
        return set()
    types = {field.name: field.type for field in fields(Cell)}
    with path.open(newline="") as file:
        return {
            Cell(**{name: kind(row[name]) for name, kind in types.items()})  # type: ignore[operator]
            for row in csv.DictReader(file)
        }


def main(options: Options) -> None:
    done = cells_of(options.out)
    cells = [cell for cell in grid(options) if cell not in done]
    started = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, mp_context=spawn) as pool:
        waiting = iter(cells)
        running = {
            pool.submit(counted, cell, options)
            for cell in itertools.islice(waiting, options.processes)
        }
        with tqdm(total=len(cells), unit="cell") as bar:
            while running:
                finished = next(as_completed(running))
                running.remove(finished)
                device = torch.device("cpu")
                write_row(options.out, where(device) | {"threads": 1} | finished.result())
                bar.update()
                if time.perf_counter() - started < 60 * options.minutes:
                    for cell in itertools.islice(waiting, 1):
                        running.add(pool.submit(counted, cell, options))


if __name__ == "__main__":
    main(tyro.cli(Options))
