"""Four widths and two seeds from one pass: what more latents buy, and what they do not.

Run: python examples/03_sweep_expansion_factors.py (half a minute)
"""

import saefeat as sf

# 64 features in 32 dimensions, each on in 2 % of the rows, and noise.
truth = sf.SyntheticActivations(n_features=64, d_in=32, density=0.02, noise=0.05, seed=0)
stream = truth.stream(batch_size=512)
bank = sf.train(
    stream,
    sf.BatchTopKConfig(k=2),
    expansion_factors=[1, 2, 4, 8],
    seeds=[0, 1],
    n_tokens=300_000,
)
report = sf.measure(bank, stream, n_tokens=20_000)
print(report)

print("\nlatents   FVU   alive   features found of 64   latents that are features")
for row in report.rows:
    if row.seed == 0:
        sae = bank[row.hook_name, row.expansion_factor, row.seed]
        match = sf.metrics.match_features(sae.W_dec.detach(), truth.directions)
        print(
            f"{row.d_sae:>7} {row.fvu:>6.3f} {row.n_alive:>6} {match.n_found():>15} "
            f"{match.precision():>22.0%}"
        )
print("\nWith latents to spare FVU hardly moves, yet more of them are alive: alive is no count.")
