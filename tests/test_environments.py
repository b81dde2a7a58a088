"""In environments of their own: the wheel and what it pulls in, and the other TransformerLens line.

They take minutes and packages from an index: `pytest -m slow tests/test_environments.py`.
"""

import os
import subprocess
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow

WITH_A_MODEL = ("test_hooks", "test_load_model", "test_stream", "test_report", "test_resume")
"""Tests that a language model takes part in, from reading hooks to a run gone on with."""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    # A checkout on the path would stand in for what is installed.
    plain = {name: one for name, one in os.environ.items() if not name.startswith("PYTHON")}
    finished = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**plain, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout[-5000:]
    return finished.stdout


def new_environment(folder: Path) -> Path:
    """The interpreter of a new virtual environment."""
    venv.create(folder, with_pip=True, symlinks=True)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution, which therefore is whole."""
    folder = tmp_path_factory.mktemp("build")
    python = new_environment(folder / "environment")
    run(python, "-m", "pip", "install", "-q", "build", cwd=folder)
    run(python, "-m", "build", "--outdir", folder / "dist", ROOT, cwd=folder)
    assert len(list((folder / "dist").glob("saefeat-*.tar.gz"))) == 1
    (built,) = (folder / "dist").glob("saefeat-*.whl")
    return built


def test_the_wheel_works_by_itself_and_pulls_in_no_extra(wheel: Path, tmp_path: Path) -> None:
    python = new_environment(tmp_path / "environment")
    constraints = ROOT / "constraints.txt"
    run(python, "-m", "pip", "install", "-q", "-c", constraints, wheel, cwd=tmp_path)
    (tmp_path / "work").mkdir()
    script = ROOT / "tests" / "environments" / "smoke.py"
    said = run(python, script, tmp_path / "work", cwd=tmp_path)
    assert said.endswith("works\n")


def test_hooks_and_whole_runs_pass_with_transformer_lens_4(wheel: Path, tmp_path: Path) -> None:
    """The other tests have 3.9, which SAELens asks for."""
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    others = [line for line in pinned if not line.startswith(("transformer-lens", "sae-lens"))]
    (tmp_path / "constraints.txt").write_text("\n".join(others))
    python = new_environment(tmp_path / "environment")
    packages = ("transformer-lens>=4", "pytest", "beartype", "hypothesis", wheel)
    run(python, "-m", "pip", "install", "-q", "-c", "constraints.txt", *packages, cwd=tmp_path)
    tests = [ROOT / "tests" / f"{name}.py" for name in WITH_A_MODEL]
    options = ("-q", "-p", "no:cacheprovider", "--rootdir", ROOT, "-c", ROOT / "pyproject.toml")
    said = run(python, "-m", "pytest", *options, *tests, cwd=tmp_path)
    assert " passed" in said
    found = run(python, "-c", "import saefeat; print(saefeat.__file__)", cwd=tmp_path)
    assert str(tmp_path) in found
    version = run(python, "-m", "pip", "show", "transformer-lens", cwd=tmp_path)
    assert "Version: 4." in version
