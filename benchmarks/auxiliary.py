"""What the auxiliary loss (AuxK) adds to a TopK step, with a share of the latents dead.

Learners of the same dictionary take turns at a step; each is told that a share of its latents is
dead, and none of them is told that any is. A goal is 0.15 at most.

    python benchmarks/auxiliary.py --out benchmarks/results/auxiliary.csv

- dead_share: latents that take part in the auxiliary loss.
- added_share: median over the rounds of the step's time over that without dead latents, less 1.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from machine import in_turn, ratio, where, write_row
from rows import structured_batches

import saefeat as sf
from saefeat.dictionaries.topk import TopK
from saefeat.kernels.dispatch import choose_kernels
from saefeat.training.bank_learner import BankLearner
from saefeat.training.dead_latents import DeadLatents


@dataclass
class Options:
    out: Path = Path("auxiliary.csv")
    batch: int = 4096
    d_in: int = 576
    d_sae: int = 4608
    k: int = 32
    dead_shares: tuple[float, ...] = (0.0, 0.01, 0.1, 0.5, 0.9)
    rounds: int = 9
    warm_up: int = 3
    """Rounds before those that count."""


class Told(DeadLatents):
    """Says that the same latents are dead at every step."""

    def __init__(self, latents: torch.Tensor, d_sae: int) -> None:
        super().__init__(d_sae, patience=10**12, device=latents.device)
        self.told = latents

    @property
    def latents(self) -> torch.Tensor:
        return self.told


def main(options: Options) -> None:
    device = torch.device("cpu")
    batches = structured_batches(4, options.batch, options.d_in)
    ways = {}
    for share in options.dead_shares:
        learner = BankLearner(
            {("x", 1, 0): TopK(sf.TopKConfig(k=options.k), options.d_in, options.d_sae)},
            n_tokens=10**9,
            n_steps=10**5,
            device=device,
            kernels=choose_kernels("auto", device)[1],
            selection_dtype=torch.bfloat16,
        )
        dead = torch.randperm(options.d_sae)[: round(share * options.d_sae)]
        learner.learners["x"]["x", 1, 0].dead = Told(dead, options.d_sae)
        ways[str(share)] = lambda step, one=learner: one.step({"x": batches[step % len(batches)]})
    seconds = in_turn(ways, rounds=options.rounds, warm_up=options.warm_up, device=device)
    for share in options.dead_shares:
        row = {
            **where(device),
            "batch": options.batch,
            "d_in": options.d_in,
            "d_sae": options.d_sae,
            "k": options.k,
            "rounds": options.rounds,
            "dead_share": share,
            "added_share": f"{ratio(seconds[str(share)], seconds['0.0']) - 1:.3f}",
        }
        write_row(options.out, row)


if __name__ == "__main__":
    main(tyro.cli(Options))
