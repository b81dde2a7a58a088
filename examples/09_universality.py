"""Do two models hold the same features? Known models, of which two do and two do not.

Run: python examples/09_universality.py (half a minute)
"""

import torch

import saefeat as sf

# Three "models" read the same tokens. A and B hold the same 48 features, each in a basis of its
# own; C holds others.
torch.manual_seed(0)
strengths = 0.5 + torch.rand(60_000, 96)
codes = (torch.rand(60_000, 96) < 0.03) * strengths
rows = {}
for name, features in (("A", slice(0, 48)), ("B", slice(0, 48)), ("C", slice(48, 96))):
    directions = torch.nn.functional.normalize(torch.randn(48, 32), dim=1)
    rows[name] = codes[:, features] @ directions

stream = sf.ActivationStream.from_tensors(rows, batch_size=512)
bank = sf.train(
    stream, sf.BatchTopKConfig(k=2), expansion_factors=[2], seeds=[0, 1], n_tokens=300_000
)
a, again = ((bank["A", 2, seed], stream) for seed in (0, 1))
for other in ("B", "C"):
    result = sf.universality(
        a, (bank[other, 2, 0], stream), again=again, n_tokens=5_000, n_resamples=200
    )
    print(result, end="\n\n")
    print(f"A and {other}: U = {result.scores[0].u.value:.1f}\n")
print("U is 1 where another model is as alike as another seed, 0 where it is as alike as chance.")
