"""Draws `results/step.csv` and `results/scaling.csv` as the one picture that the README shows.

    python benchmarks/plot.py

Left, one group of bars for each kind at the first shape: the peers' step over ours, so that 1 is
this library. Right, our step's time per latent against the number of latents.
"""

from pathlib import Path

import matplotlib
from machine import read_rows

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent / "results"
SHAPE = {"batch": "4096", "d_in": "576", "d_sae": "4608", "k": "32"}
PEERS = {
    "sae-lens": "#4c72b0",
    "sae-lens-autocast": "#8fb0dd",
    "dictionary-learning": "#dd8452",
    "sparsify": "#55a868",
}


def main() -> None:
    steps = [
        row
        for row in read_rows(RESULTS / "step.csv")
        if all(row[name] == v for name, v in SHAPE.items())
    ]
    ratios = {
        (row["kind"], row["contestant"]): float(row["over_saefeat"])
        for row in steps
        if row["contestant"] in PEERS and row["over_saefeat"]
    }
    kinds = list(dict.fromkeys(kind for kind, _ in ratios))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(3, 2))
    for number, (peer, colour) in enumerate(PEERS.items()):
        held = [(i, ratios[kind, peer]) for i, kind in enumerate(kinds) if (kind, peer) in ratios]
        bars = left.bar(
            [i + 0.2 * (number - 1.5) for i, _ in held],
            [ratio for _, ratio in held],
            width=0.19,
            color=colour,
            label=peer,
        )
        left.bar_label(bars, fmt="%.0f", fontsize=7)
    left.axhline(1, color="black", linewidth=1)
    left.set_xticks(range(len(kinds)), [kind.replace("_", "\n") for kind in kinds], fontsize=8)
    left.set_ylabel("time of a training step, saefeat = 1")
    left.set_title("4,096 tokens, d_in 576, 4,608 latents, k 32", fontsize=10)
    left.legend(fontsize=8)
    scan = [row for row in read_rows(RESULTS / "scaling.csv") if row["scan"] == "d_sae"]
    right.plot(
        [int(row["d_sae"]) for row in scan],
        [float(row["us_per_latent"]) for row in scan],
        marker="o",
        color="#c44e52",
    )
    right.set_xscale("log", base=2)
    right.set_ylim(bottom=0)
    right.set_xlabel("latents")
    right.set_ylabel("µs per latent and TopK step")
    right.set_title("2,048 tokens, d_in 576, k 32", fontsize=10)
    figure.suptitle(
        f"{steps[0]['processor']}, {steps[0]['threads']} threads, torch {steps[0]['torch']}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(RESULTS / "speed.png", dpi=110)


if __name__ == "__main__":
    main()
