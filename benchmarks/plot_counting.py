"""Draws `results/counting.csv` as the map of the detection limit, and prints the table of biases.

    python benchmarks/plot_counting.py

Left the count by matching pursuit, right that of SAEs (latents that two of three seeds share,
copies merged), on the same layers: independent features of equal density, in the width with most
cells.
A cell is coloured by the error of the count, worst over noise and seeds; hatched cells are flagged
as beyond the limit, and have a lower bound only. SAEs count as flagged where the coverage of their
seeds is below 0.9. The line is where 2 x load is 1.
"""

import math
from collections import Counter, defaultdict
from pathlib import Path

import matplotlib
from machine import read_rows

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle

RESULTS = Path(__file__).parent / "results"
WORST = 50.0
"""Error in per cent at the end of the colour scale."""
FLAGGED_BELOW = 0.9

Row = dict[str, str]


def main() -> None:
    rows = read_rows(RESULTS / "counting.csv")
    print_table(rows)
    mapped = [row for row in rows if row["sae_distinct"]]
    width = Counter(row["d_in"] for row in mapped).most_common(1)[0][0]
    mapped = [row for row in mapped if row["d_in"] == width]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    colours = plt.get_cmap("RdYlGn_r")
    for axis, title, error, flagged in (
        (axes[0], "matching pursuit (count_features)", own_error, lambda row: not is_sure(row)),
        (
            axes[1],
            "BatchTopK SAEs, 4 times the rows, told n and L0",
            lambda row: relative(row["sae_distinct"], row),
            lambda row: float(row["sae_coverage"]) < FLAGGED_BELOW,
        ),
    ):
        cells: dict[tuple[float, float], list[tuple[float, bool]]] = defaultdict(list)
        for row in mapped:
            place = float(row["density"]), float(row["features_per_neuron"])
            cells[place].append((100 * error(row), flagged(row)))
        draw(axis, cells, colours)
        axis.set_title(title, fontsize=10)
    axes[0].set_ylabel("features per neuron")
    scale = ScalarMappable(Normalize(0, WORST), colours)
    figure.colorbar(scale, ax=axes, label="error of the count, % of the features", extend="max")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=9)
    figure.suptitle(f"{width} neurons; hatched: flagged as beyond the limit", fontsize=10)
    figure.savefig(RESULTS / "counting.png", dpi=110)


def draw(
    axis: Axes, cells: dict[tuple[float, float], list[tuple[float, bool]]], colours: plt.Colormap
) -> None:
    """One map, and the line at which 2 x load is 1."""
    densities = sorted({density for density, _ in cells})
    degrees = sorted({degree for _, degree in cells})
    for (density, degree), measured in cells.items():
        x, y = densities.index(density), degrees.index(degree)
        worst = max(measured, key=lambda one: abs(one[0]))[0]
        is_flagged = all(one[1] for one in measured)
        axis.add_patch(
            Rectangle(
                (x - 0.5, y - 0.5),
                1,
                1,
                facecolor="lightgrey" if is_flagged else colours(abs(worst) / WORST),
                edgecolor="white",
                hatch="///" if is_flagged else None,
            )
        )
        text = f"≥ {100 + worst:.0f} %" if is_flagged else f"{worst:+.1f} %"
        is_dark = not is_flagged and not 10 < abs(worst) < 40
        colour = "white" if is_dark else "black"
        axis.text(x, y, text, ha="center", va="center", fontsize=10, color=colour)
    # Cells are evenly spaced in the index of a density and of a degree: so is the line.
    steps = [index / 50 for index in range(-25, 50 * len(densities) - 25)]
    line = [(x, at(degree_at(along(densities, x)), degrees)) for x in steps]
    axis.plot(*zip(*line, strict=True), color="black", linewidth=2, label="2 × load = 1")
    axis.set_xlim(-0.5, len(densities) - 0.5)
    axis.set_ylim(-0.5, len(degrees) - 0.5)
    axis.set_xticks(range(len(densities)), [f"{density:g}" for density in densities])
    axis.set_yticks(range(len(degrees)), [f"{degree:g}" for degree in degrees])
    axis.set_xlabel("density of each feature")


def degree_at(density: float) -> float:
    """Features per neuron at which 2 x load is 1."""
    return 1 / (2 * density * math.log(1 / density))


def along(values: list[float], index: float) -> float:
    """The value at a fractional index, by the logarithm, beyond the ends too."""
    low = min(max(int(index), 0), len(values) - 2)
    share = index - low
    return float(values[low] ** (1 - share) * values[low + 1] ** share)


def at(value: float, values: list[float]) -> float:
    """The fractional index of a value: `along` the other way round."""
    low = max((i for i, one in enumerate(values[:-1]) if one <= value), default=0)
    step = math.log(values[low + 1] / values[low])
    return low + math.log(value / values[low]) / step


def relative(number: str, row: Row) -> float:
    """A count's error, as a share of the features."""
    return float(number) / float(row["n_features"]) - 1


def own_error(row: Row) -> float:
    return relative(row["estimate"], row)


def is_sure(row: Row) -> bool:
    return row["identifiable"] == "True"


def print_table(rows: list[Row]) -> None:
    """Bias and cover of the groups of cells for which there are goals."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        twice = float(row["twice_load"])
        equal = (row["distribution"], row["structure"]) == ("constant", "independent")
        if twice >= 1.2:
            groups["2 x load from 1.2 on"].append(row)
        elif twice >= 0.9:
            groups["2 x load from 0.9 to 1.2"].append(row)
        elif equal:
            groups["equal densities, below 0.9"].append(row)
        elif twice < 0.7:
            groups["Zipf, correlated or hierarchical, below 0.7"].append(row)
        else:
            groups["Zipf, correlated or hierarchical, 0.7 to 0.9"].append(row)
    print(
        f"{'':<46} {'cells':>5} {'flagged':>7} {'mean |error|':>12} {'largest':>8} {'covered':>8}"
    )
    for name, group in sorted(groups.items()):
        sure = [row for row in group if is_sure(row)]
        errors = [abs(own_error(row)) for row in sure]
        covered = [
            float(row["low"]) <= float(row["n_features"]) <= float(row["high"]) for row in sure
        ]
        numbers = (
            f"{sum(errors) / len(sure):>11.1%} {max(errors):>9.1%} {sum(covered):>4}/{len(sure)}"
            if sure
            else ""
        )
        print(f"{name:<46} {len(group):>5} {len(group) - len(sure):>7} {numbers}")


if __name__ == "__main__":
    main()
