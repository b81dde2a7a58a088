"""Phases of superposition: toy models of rarer and rarer features, and the polytopes they form.

After Elhage et al. 2022, "Toy Models of Superposition". All models are trained at once.

Run: python examples/10_toy_model_phases.py (a few seconds; draws toy_model_phases.png)
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure

import saefeat as sf

N_FEATURES, N_DIMS, SEEDS = 40, 6, (0, 1)
sparsity = torch.logspace(0, 1.3, 32).tolist()  # 1 / (1 - S), from always on to 5 % of the time
models = sf.superposition.train_toy_models(
    n_features=N_FEATURES,
    n_dims=N_DIMS,
    densities=[1 / x for x in sparsity],
    seeds=SEEDS,
    n_steps=1_500,
    batch_size=128,
)
dimensionality = sf.superposition.feature_dimensionality(models.W)
per_feature = sf.superposition.dimensions_per_feature(models.W).reshape(len(sparsity), -1).mean(1)
norm = models.W.norm(dim=-1)

print("1/(1-S)   features per dimension   dimensions per feature   median feature has")
for i in range(0, len(sparsity), 4):
    of_density = slice(i * len(SEEDS), (i + 1) * len(SEEDS))
    kept = dimensionality[of_density][norm[of_density] > 0.5]
    median = f"{float(kept.median()):.2f}" if len(kept) else "none stored"
    print(f"{sparsity[i]:7.1f} {1 / per_feature[i]:24.2f} {per_feature[i]:24.2f} {median:>20}")
print("\n0.50 of a dimension each: antipodal pairs, two features on one axis with opposite signs")

figure = Figure(figsize=(10, 5.5), layout="constrained")
main, side = figure.subplots(1, 2, width_ratios=[5, 1], sharey=True)
x = (1 / models.density)[:, None].expand_as(norm)
jitter = torch.empty_like(norm).uniform_(-0.012, 0.012, generator=torch.Generator().manual_seed(0))
main.scatter(
    x * jitter.exp(),
    dimensionality,
    s=9,
    color="tab:blue",
    linewidths=0,
    alpha=norm.clamp(0.1, 1).mul(0.6).flatten().numpy(),
)
main.scatter([], [], s=20, color="tab:blue", label="a feature, as strong as its norm")
main.plot(sparsity, per_feature, color="black", label="m / |W|²")
stored = norm > 0.5
side.hist(dimensionality[stored], bins=100, range=(0, 1), orientation="horizontal")
# Gosset's 27 points in six dimensions are not in the paper, but six dimensions find them.
plateaus = {**sf.superposition.PLATEAUS, "27 points (Gosset)": N_DIMS / 27}
for name, plateau in plateaus.items():
    for panel in (main, side):
        panel.axhline(plateau, color="tab:red", linewidth=0.8, linestyle=":", zorder=0)
    lift = {"square antiprism": -0.034, "27 points (Gosset)": 0.015}.get(name, 0.003)
    main.text(20, plateau + lift, name, color="tab:red", fontsize=8, ha="right", va="bottom")
main.set(
    xscale="log",
    xlabel="1 / (1 − S): the rarer, the further right",
    ylabel="dimensions per feature",
    xlim=(0.95, 20.6),
    ylim=(0, 1.06),
    title=f"{N_FEATURES} equally important features in {N_DIMS} dimensions",
)
main.set_xticks([1, 2, 3, 5, 10, 20], ["1", "2", "3", "5", "10", "20"])
main.minorticks_off()
main.legend(loc="upper right", bbox_to_anchor=(1, 0.92), frameon=False, fontsize=9)
side.set(xlabel="stored features", title="norm > 0.5")
out = Path("toy_model_phases.png")
figure.savefig(out, dpi=130)
print(f"The picture is in {out.absolute()}")
