"""What one does first with an installed saefeat: `python smoke.py FOLDER`, outside a checkout."""

import subprocess
import sys
from importlib import resources, util
from pathlib import Path

import saefeat as sf

assert "torch" not in sys.modules, "importing saefeat is to cost no more than importing torch"
assert "site-packages" in sf.__file__, sf.__file__
assert resources.files("saefeat").joinpath("py.typed").is_file()
for extra in ("sae_lens", "tensorboard", "gguf", "ipywidgets", "s3fs", "pytest", "ruff"):
    assert util.find_spec(extra) is None, f"{extra} is there, and no default use needs it"

import torch  # noqa: E402

folder = Path(sys.argv[1])
x = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0)).relu()
stream = sf.ActivationStream.from_tensors({"layer": x}, batch_size=200)
for config in (sf.TopKConfig(k=4), sf.MatchingPursuitConfig(k=4)):
    bank = sf.train(
        stream, config, expansion_factors=[2], n_tokens=4000, out=folder / type(config).__name__
    )
report = sf.measure(bank, stream, n_tokens=300)
report.save(folder / "report")
assert str(sf.Report.load(folder / "report")) == str(report)
one = sf.load_dictionary(bank["layer", 2, 0].save(folder / "sae"))
assert torch.equal(one(x[:9]), bank["layer", 2, 0](x[:9]))
sf.cache_activations(stream, folder / "acts")
assert sf.ActivationStream.from_store(folder / "acts").n_rows == stream.n_rows

command = Path(sys.executable).with_name("saefeat")
for arguments in (["--help"], ["train", "--help"], ["measure", "--help"]):
    said = subprocess.run([command, *arguments], capture_output=True, text=True, check=True).stdout
    assert "usage: saefeat" in said
shown = subprocess.run(
    [command, "report", folder / "report"], capture_output=True, text=True, check=True
)
assert "layer" in shown.stdout
print("works")
