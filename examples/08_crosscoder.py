"""One set of latents for four layers: which features persist through them, and which do not.

Run: python examples/08_crosscoder.py (half a minute)
"""

import torch

import saefeat as sf

# 16 features persist through four layers of 32 neurons; 8 more are each layer's own.
torch.manual_seed(0)
N_PERSISTENT, N_OWN, LAYERS = 16, 8, [f"blocks.{i}.hook_resid_post" for i in range(4)]
n_features = N_PERSISTENT + N_OWN * len(LAYERS)
on = torch.rand(60_000, n_features) < 0.06
codes = on * (0.5 + torch.rand(on.shape))
rows, known = {}, torch.zeros(n_features, 4 * 32)
for i, layer in enumerate(LAYERS):
    first_own = N_PERSISTENT + i * N_OWN
    held = [*range(N_PERSISTENT), *range(first_own, first_own + N_OWN)]
    directions = torch.nn.functional.normalize(torch.randn(len(held), 32), dim=1)
    # A feature that persists points elsewhere at every layer.
    rows[layer] = codes[:, held] @ directions
    known[held, i * 32 : (i + 1) * 32] = directions

stream = sf.ActivationStream.from_tensors(rows, batch_size=512)
bank = sf.train(
    stream,
    sf.CrosscoderConfig(k=3),
    groups={"all": ["blocks.*"]},
    expansion_factors=[2],
    n_tokens=600_000,
)
report = sf.measure(bank, stream, n_tokens=5_000)
print(report)
print("\nFVU by layer:", {name: round(fvu, 3) for name, fvu in report.rows[0].fvu_by_hook.items()})

# Of the latents that match a known feature: how many layers hold them? A layer holds a latent
# whose decoder there is a tenth of its longest, at least.
crosscoder = bank["all", 2, 0]
match = sf.metrics.match_features(crosscoder.W_dec.detach(), known)
norms = crosscoder.hook_norms.detach()
n_layers = (norms > 0.1 * norms.amax(1, keepdim=True)).sum(1)
for name, is_kind, n_held in (
    ("persist", match.features < N_PERSISTENT, 4),
    ("are one layer's own", match.features >= N_PERSISTENT, 1),
):
    found = match.latents[is_kind & (match.cosines > 0.9)]
    right = int((n_layers[found] == n_held).sum())
    print(
        f"features that {name}: {len(found)} of {int(is_kind.sum())} found, "
        f"{right} of them in a latent of {n_held} of 4 layers"
    )
