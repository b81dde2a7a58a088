"""Activations of your own: the hidden layer of any network, here one that redraws crossing bars.

Run: python examples/04_your_own_activations.py (a few seconds)
"""

import torch
from torch import nn

import saefeat as sf

# Images of 8 x 8 pixels in which each of 8 rows and 8 columns is drawn one time in eight.
torch.manual_seed(0)
bars = torch.rand(60_000, 16) < 1 / 8
images = (bars[:, :8, None] | bars[:, None, 8:]).float().flatten(1)

network = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64))
optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
for batch in images.split(100):
    loss = nn.functional.binary_cross_entropy_with_logits(network(batch), batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
wrong = ((network(images) > 0) != images).float().mean()
print(f"pixels that the network gets wrong: {float(wrong):.2%}\n")

# Any tensor [n, d] will do. A forward hook gets it out of any torch module.
kept = []
handle = network[1].register_forward_hook(lambda module, inputs, output: kept.append(output))
with torch.no_grad():
    network(images)
handle.remove()

stream = sf.ActivationStream.from_tensors({"hidden": torch.cat(kept)}, batch_size=512)
bank = sf.train(stream, sf.BatchTopKConfig(k=3), expansion_factors=[2], n_tokens=300_000)
print(sf.measure(bank, stream, n_tokens=6_000))

# Is there a latent that says whether a bar is there?
sae = bank["hidden", 2, 0]
codes = sae.encode(torch.cat(kept)).to_dense()
alive = codes[:, codes.std(0) > 0]
correlations = torch.corrcoef(torch.cat([alive, bars.float()], dim=1).T)[: alive.shape[1], -16:]
best = correlations.max(dim=0).values
print(f"\nbars with a latent of their own (r > 0.8): {int((best > 0.8).sum())} of 16")
