"""Every example runs as a newcomer would run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
ARGUMENTS = {"02_all_layers_in_one_pass.py": ["2000"]}
LAUNCHERS = {
    "10_many_gpus.py": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
}
EXPECTED = {
    "01_first_sae.py": "found at cosine > 0.9: 64 of 64 hidden directions",
    "02_all_layers_in_one_pass.py": "blocks.29.hook_resid_post",
    # At 1 / (1 - S) = 3.2: the median dimensionality.
    "03_toy_model_phases.py": "    3.2                     2.0",
    "04_count_features.py": "features found at a cosine of 0.9: 96 of 96",
    "10_many_gpus.py": "2 processes, which divide the data",
}


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_example_runs_and_prints_what_it_promises(name, request, tmp_path):
    source = (EXAMPLES / name).read_text()
    assert len(source.splitlines()) < 80
    if "smollm2" in source:
        request.getfixturevalue("smollm2")  # skips where the weights are missing
    finished = subprocess.run(
        [sys.executable, *LAUNCHERS.get(name, []), EXAMPLES / name, *ARGUMENTS.get(name, [])],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert finished.returncode == 0, finished.stderr
    assert EXPECTED[name] in finished.stdout
