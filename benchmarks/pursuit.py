"""Does batched matching pursuit cost what its arithmetic has to?

    python benchmarks/pursuit.py --out benchmarks/results/pursuit.csv

For each shape the pursuit, with the atoms' inner products at hand, takes turns with the one dense
product that it cannot do without, all rows by all atoms in float32.

- products: median over the rounds of the pursuit's time over the product's.
- bound: the least number of products by Batch-OMP's count of operations (Rubinstein, Zibulevsky and
  Elad 2008): 1 + (k^2 / 2 + 3 k) / d_in, multiplications at the product's rate.
- over_bound: the one over the other.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from machine import in_turn, ratio, where, write_row
from rows import structured_batches

from saefeat.dictionaries.base import random_unit_rows
from saefeat.kernels.dispatch import choose_kernels


@dataclass
class Options:
    out: Path = Path("pursuit.csv")
    shapes: tuple[tuple[int, int, int, int], ...] = (
        (4096, 576, 4608, 32),
        (4096, 576, 2304, 4),
        (4096, 96, 1728, 8),
        (4096, 32, 576, 4),
    )
    """Rows, d_in, atoms, picks."""
    rounds: int = 9
    warm_up: int = 2
    """Rounds before those that count."""
    device: str = "cpu"


def main(options: Options) -> None:
    device = torch.device(options.device)
    _, kernels = choose_kernels("auto", device)
    for n_rows, d_in, n_atoms, picks in options.shapes:
        (x,) = structured_batches(1, n_rows, d_in)
        x = x.to(device)
        atoms = random_unit_rows(n_atoms, d_in, torch.Generator().manual_seed(0)).to(device)
        gram = atoms @ atoms.T

        def pursue(_: int, x=x, atoms=atoms, picks=picks, gram=gram) -> object:
            return kernels.matching_pursuit(x, atoms, picks, 0.0, gram)

        def multiply(_: int, x=x, atoms=atoms) -> object:
            return x @ atoms.T

        seconds = in_turn(
            {"pursuit": pursue, "product": multiply},
            rounds=options.rounds,
            warm_up=options.warm_up,
            device=device,
        )
        products = ratio(seconds["pursuit"], seconds["product"])
        bound = 1 + (picks**2 / 2 + 3 * picks) / d_in
        write_row(
            options.out,
            {
                **where(device),
                "rows": n_rows,
                "d_in": d_in,
                "atoms": n_atoms,
                "picks": picks,
                "rounds": options.rounds,
                "ms": f"{1e3 * statistics.median(seconds['pursuit']):.2f}",
                "products": f"{products:.2f}",
                "bound": f"{bound:.2f}",
                "over_bound": f"{products / bound:.2f}",
            },
        )


if __name__ == "__main__":
    main(tyro.cli(Options))
