"""Opens a dictionary of Gemma Scope (Lieberum et al. 2024): from the hub, or from its file.

Run: python examples/07_gemma_scope.py (a few seconds: writes a file of that layout, and opens it)
 or: python examples/07_gemma_scope.py hub (downloads the real one through SAELens, 300 MB)
Needs, for the hub: pip install -e '.[sae-lens]'
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import saefeat as sf

if sys.argv[1:] == ["hub"]:
    sae = sf.load_dictionary("gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical")
    print(f"{sae.d_sae:,} latents of {sae.origin.model_name} at {sae.hook_name}")
    raise SystemExit

# A JumpReLU dictionary, as Gemma Scope's are, of activations whose features are known.
truth = sf.SyntheticActivations(n_features=64, d_in=32, density=0.02, noise=0.05, seed=0)
stream = truth.stream(batch_size=512)
bank = sf.train(stream, sf.JumpReLUConfig(target_l0=2), expansion_factors=[4], n_tokens=300_000)
(trained,) = bank.values()

# Gemma Scope's params.npz: float32, [d_in, d_sae], and an encoder that reads x, not x - b_dec.
folder = Path(tempfile.mkdtemp()) / "layer_20" / "width_128" / "average_l0_2"
folder.mkdir(parents=True)
weights = {name: tensor.detach().float() for name, tensor in trained.file_tensors().items()}
weights["b_enc"] = weights["b_enc"] - weights["b_dec"] @ weights["W_enc"]
np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in weights.items()})
print(f"{folder}/params.npz holds {', '.join(f'{n} {list(w.shape)}' for n, w in weights.items())}")

# The file does not say which hook it reads, so the reader does.
sae = sf.load_dictionary(folder).with_origin(hook_name=stream.hooks[0])
x = next(stream.held_out_batches(1_000))[sae.hook_name]
codes, codes_as_trained = sae.encode(x), trained.encode(x)
fvu = sf.metrics.fraction_variance_unexplained(x, sae.decode(codes))
print(f"{sae.d_sae} latents: L0 {float(sf.metrics.l0(codes)):.2f}, FVU {float(fvu):.3f}")
torch.testing.assert_close(codes.to_dense(), codes_as_trained.to_dense(), rtol=1e-4, atol=1e-4)
print("The file opens with the codes that the dictionary had before it was written.")
