"""Every example runs as a newcomer would run it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
ARGUMENTS = {"02_all_layers_in_one_pass.py": ["2000"], "05_steer.py": ["2000"]}
LAUNCHERS = {
    "12_many_gpus.py": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
}
EXPECTED = {
    "01_first_sae.py": "found at cosine > 0.9: 64 of 64 hidden directions",
    "02_all_layers_in_one_pass.py": "blocks.29.hook_resid_post",
    "03_sweep_expansion_factors.py": r"    128  0\.1\d\d +1\d\d +6\d ",
    "04_your_own_activations.py": r"bars with a latent of their own \(r > 0\.8\): 1[3-6] of 16",
    "05_steer.py": "unedited splice is the identity: True",
    "06_count_features.py": "features found at a cosine of 0.9: 96 of 96",
    "07_gemma_scope.py": "opens with the codes that the dictionary had before",
    "08_crosscoder.py": "one layer's own: 3[0-2] of 32 found, 3[0-2] of them in a latent of 1 of 4",
    "09_universality.py": r"A and B: U = 0\.9\n(.*\n)+A and C: U = 0\.0",
    # At 1 / (1 - S) = 3.2: the median dimensionality.
    "10_toy_model_phases.py": "    3.2                     2.0",
    "11_study_in_quick_mode.py": "residual, by matching_pursuit: The features could not be counted",
    "12_many_gpus.py": "2 processes, which divide the data",
}


SLOW = {"11_study_in_quick_mode.py"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(path.name, marks=[pytest.mark.slow] if path.name in SLOW else [])
        for path in sorted(EXAMPLES.glob("*.py"))
    ],
)
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
    assert re.search(EXPECTED[name], finished.stdout), finished.stdout
