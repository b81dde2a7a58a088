"""A first dictionary: activations of your own, no language model, a few seconds.

Run: python examples/01_first_sae.py
"""

import torch

import saefeat as sf

# 64 hidden directions in 32 dimensions, about two of them on in each sample.
generator = torch.Generator().manual_seed(0)
directions = torch.nn.functional.normalize(torch.randn(64, 32, generator=generator), dim=1)
on = torch.rand(100_000, 64, generator=generator) < 2 / 64
strength = 1 + torch.rand(100_000, 64, generator=generator)
x = (on * strength) @ directions

stream = sf.ActivationStream.from_tensors({"layer": x}, batch_size=512)
bank = sf.train(
    stream,
    sf.TopKConfig(k=3, learning_rate=3e-3),
    expansion_factors=[4],
    seeds=[0],
    n_tokens=500_000,
)
print(sf.measure(bank, stream, n_tokens=10_000))

# Which hidden directions did the dictionary find?
sae = bank["layer", 4, 0]
cosine = (sae.W_dec @ directions.T).max(dim=0).values
print(f"\nfound at cosine > 0.9: {int((cosine > 0.9).sum())} of 64 hidden directions")
