"""Counts the features of a layer in which they are known, and sees what was found.

Run: python examples/06_count_features.py (half a minute)
"""

import saefeat as sf

# 96 features in 32 dimensions: three for each neuron, each on in 2 % of the rows, and noise.
truth = sf.SyntheticActivations(n_features=96, d_in=32, density=0.02, noise=0.05, seed=0)
count = sf.count_features(
    truth.stream(batch_size=512),
    n_tokens=150_000,
    picks=(1, 2, 4),
    expansion_factors=(4, 8),
    saes=False,
    progress=False,
)
print(count)
print(f"\nfeatures per neuron: {count.per_neuron:.2f} (true: {96 / 32:.2f})")
load = sf.superposition.load(truth.densities, n_neurons=32)
print(f"2 x load: {2 * count.load:.2f} (true: {2 * load:.2f})")
match = sf.metrics.match_features(count.directions.float(), truth.directions)
print(f"features found at a cosine of 0.9: {match.n_found()} of 96")

print("\nwhat each width and number of picks agreed on")
print("atoms  picks     rows  features  energy found again")
for step in count.steps:
    print(
        f"{step.d_sae:>5}  {step.picks:>5}  {step.n_tokens:>7}  {step.n_features:>8}  "
        f"{step.shared_energy:.2f}"
    )
