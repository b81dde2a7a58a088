"""Does the equal-parameter study reach the right verdict? Models whose features are known, judged.

    OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python benchmarks/study_simulation.py --runs 20 \
        --out benchmarks/results/study_simulation.csv

Under each of the three theories a run draws four models each of a narrow shape, A, and a wide one,
B, of as many parameters; every layer is synthetic activations, counted blind by `count_features`
and judged by `findings`, as activations of trained models are. All features are equally dense. One
row for each run of a theory; those that the CSV has already are left out, so that what was
stopped goes on when the command is given again, and more `--runs` add to it. A run takes about a
minute of one core. At the end the shares of right and wrong verdicts are printed.

- theory, run: the truth, and the seed of all its draws.
- n_tokens: rows that a layer's last dictionaries are fitted on.
- features_a, features_b: true features of a layer, mean over layers and models.
- counted_a, counted_b: the same as counted, of the models that were; empty if too few were.
- layers_a, layers_b: layers that could be counted, of 16 and of 4.
- slope, low, high: beta of ln(features per neuron) on ln(width), and its interval.
- p_value: of A against B by permutation; the least that four and four can give is 0.029.
- status, found, conclusion: the verdict.
- right: the theory was claimed. wrong: another was.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from machine import read_rows, where, write_row

import saefeat as sf
from saefeat.study import (
    Finding,
    LayerObservation,
    Observations,
    ObservedShape,
    Rules,
    findings,
)

N_MODELS = 4
"""Of each shape."""
DENSITY = 0.03
DEGREE = 1.5
"""Features per neuron of A: 2 x load is 0.32, and 0.63 in B where it has twice as many."""
SPREAD = 0.05
"""Standard deviation of ln of what models of one shape hold."""
SHAPES = tuple(
    ObservedShape(
        label=label, n_layers=n_layers, d_model=d_model, n_parameters=12 * n_layers * d_model**2
    )
    for label, n_layers, d_model in (("A", 4, 16), ("B", 1, 32))
)
"""The study's shapes, 8 layers of 48 and 2 of 96, at half of the layers and a third of the width.
"""


def partitioned(shape: ObservedShape, size: float, generator: np.random.Generator) -> np.ndarray:
    """Each of as many features as the four layers of A hold lies in one layer, by chance."""
    total = round(size * DEGREE * SHAPES[0].d_model * SHAPES[0].n_layers)
    return generator.multinomial(total, [1 / shape.n_layers] * shape.n_layers)


def filled(shape: ObservedShape, size: float, generator: np.random.Generator) -> np.ndarray:
    """Every layer holds what its width has room for."""
    return np.full(shape.n_layers, round(size * DEGREE * shape.d_model))


def shared(shape: ObservedShape, size: float, generator: np.random.Generator) -> np.ndarray:
    """Every layer holds all features, which are as many as one layer of A holds."""
    return np.full(shape.n_layers, round(size * DEGREE * SHAPES[0].d_model))


TRUTHS: dict[str, Callable[[ObservedShape, float, np.random.Generator], np.ndarray]] = {
    "partitioned": partitioned,
    "filled": filled,
    "shared": shared,
}
"""Features of each layer of a model, by theory; `size` is how much it holds beside others."""


@dataclass
class Options:
    out: Path = Path("study_simulation.csv")
    runs: int = 20
    """Of each theory."""
    theories: tuple[str, ...] = tuple(TRUTHS)
    n_tokens: int = 80_000
    """Rows that a layer is counted on."""


def simulated(theory: str, run: int, n_tokens: int) -> tuple[dict[str, float], Observations]:
    """Mean true features of a layer by shape, and what was counted."""
    generator = np.random.default_rng([run, list(TRUTHS).index(theory)])
    true: dict[str, float] = {}
    layers = []
    for shape in SHAPES:
        sizes = np.exp(SPREAD * generator.standard_normal(N_MODELS))
        numbers = np.stack([TRUTHS[theory](shape, size, generator) for size in sizes])
        true[shape.label] = float(numbers.mean())
        for (model_seed, layer), n_features in np.ndenumerate(numbers):
            truth = sf.SyntheticActivations(
                n_features=int(n_features),
                d_in=shape.d_model,
                density=DENSITY,
                seed=int(generator.integers(2**31)),
            )
            count = sf.count_features(
                truth.stream(batch_size=128, hook_name=f"blocks.{layer}.mlp", held_out_rows=4096),
                n_tokens=n_tokens,
                picks=(1, 2),
                expansion_factors=(4,),
                saes=False,
                device="cpu",
                progress=False,
            )
            layers.append(
                LayerObservation.of_count(
                    count,
                    shape_label=shape.label,
                    model_seed=model_seed,
                    site="mlp",
                    layer=layer,
                )
            )
    return true, Observations(shapes=SHAPES, pair=("A", "B"), layers=tuple(layers))


def row_of(theory: str, run: int, n_tokens: int) -> dict[str, Any]:
    """A run of a theory and its verdict."""
    true, observations = simulated(theory, run, n_tokens)
    (found,) = findings(observations, Rules()).parts
    beta, verdict = found.slope, found.verdict
    counted = {label: _mean(found, label) for label in true}
    return {
        "theory": theory,
        "run": run,
        "n_tokens": n_tokens,
        **{f"features_{label.lower()}": round(value, 2) for label, value in true.items()},
        **{f"counted_{label.lower()}": value for label, value in counted.items()},
        **{f"layers_{label.lower()}": n for label, (n, _) in found.counted.items()},
        "slope": "" if beta is None else round(beta.value, 4),
        "low": "" if beta is None else round(beta.low, 4),
        "high": "" if beta is None else round(beta.high, 4),
        "p_value": "" if found.permutation is None else round(found.permutation.p_value, 4),
        "status": verdict.status,
        "found": verdict.theory or "",
        "conclusion": verdict.conclusion,
        "right": verdict.status == "claimed" and verdict.theory == theory,
        "wrong": verdict.theory not in (theory, None),
    }


def _mean(found: Finding, label: str) -> float | str:
    values = [one.features_per_layer for one in found.replicates if one.shape_label == label]
    return round(float(np.mean(values)), 2) if values else ""


def main(options: Options) -> None:
    torch.set_num_threads(1)
    done = {(row["theory"], int(row["run"])) for row in read_rows(options.out)}
    for run in range(options.runs):
        for theory in options.theories:
            if (theory, run) not in done:
                row = row_of(theory, run, options.n_tokens)
                write_row(options.out, where(torch.device("cpu")) | row)
    for theory in options.theories:
        own = [row for row in read_rows(options.out) if row["theory"] == theory]
        right, wrong = (sum(row[name] == "True" for row in own) for name in ("right", "wrong"))
        print(f"{theory}: {right} of {len(own)} right, {wrong} wrong")


if __name__ == "__main__":
    main(tyro.cli(Options))
