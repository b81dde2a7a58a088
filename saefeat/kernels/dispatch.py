"""Which kernels run: decided once, by device and by what is installed, and written down."""

import os
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saefeat.kernels.codes import Codes, SparsityPattern


@runtime_checkable
class Kernels(Protocol):
    """What a backend module offers; `eager` documents each function."""

    def top_k(self, scores: Float[Tensor, "n d_sae"], k: int) -> Int[Tensor, "n k"]: ...

    def batch_top_k(
        self, scores: Float[Tensor, "n d_sae"], n_kept: int
    ) -> tuple[SparsityPattern, Float[Tensor, ""]]: ...

    def above(
        self, scores: Float[Tensor, "n d_sae"], floor: Float[Tensor, " d_sae"]
    ) -> SparsityPattern: ...

    def sampled_product(
        self,
        pattern: SparsityPattern,
        left: Float[Tensor, "n d"],
        right: Float[Tensor, "d_sae d"],
    ) -> Float[Tensor, " nnz"]: ...

    def product(
        self,
        pattern: SparsityPattern,
        values: Float[Tensor, " nnz"],
        weight: Float[Tensor, "d_sae d"],
    ) -> Float[Tensor, "n d"]: ...

    def transposed_product(
        self,
        pattern: SparsityPattern,
        values: Float[Tensor, " nnz"],
        rows: Float[Tensor, "n d"],
        out: Float[Tensor, "d_sae d"] | None = None,
    ) -> Float[Tensor, "d_sae d"]: ...

    def latent_sums(
        self, pattern: SparsityPattern, values: Float[Tensor, " nnz"]
    ) -> Float[Tensor, " d_sae"]: ...

    def matching_pursuit(
        self,
        x: Float[Tensor, "n d"],
        atoms: Float[Tensor, "d_sae d"],
        k: int,
        tolerance: float = 0.0,
        gram: Float[Tensor, "d_sae d_sae"] | None = None,
    ) -> Codes: ...


BACKENDS = ("eager", "stock", "cpu", "triton")
"""Modules of this room that implement `Kernels`, the plainest first."""


def load_kernels(name: str) -> Kernels:
    """The backend called `name`; what it is made of is imported only now."""
    backend: Kernels = import_module(f"saefeat.kernels.{name}")
    return backend


def choose_kernels(name: str, device: torch.device) -> tuple[str, Kernels]:
    """The backend called `name`, or for "auto" the fastest that this device has.

    Returns:
        The backend's name, to be written into the run's config, and the backend.

    Raises:
        ValueError: No backend is called `name`, or it cannot run here.
    """
    reasons = {backend: _why_not(backend, device) for backend in BACKENDS}
    if name == "auto":
        able = [backend for backend, reason in reasons.items() if reason is None]
        name = [backend for backend in able if not _is_interpreted(backend)][-1]
    if name not in BACKENDS:
        raise ValueError(f"kernels must be 'auto' or one of {list(BACKENDS)}, got {name!r}.")
    if reasons[name] is not None:
        raise ValueError(f"kernels={name!r} cannot run here: {reasons[name]}")
    return name, load_kernels(name)


def _why_not(name: str, device: torch.device) -> str | None:
    """Why a backend cannot run on `device`; None if it can."""
    if name == "cpu" and device.type != "cpu":
        return f"it is for processors, and the device is {device}."
    if name == "cpu" and find_spec("numba") is None:
        return "it needs numba. Run: pip install numba"
    # The device first: a search for a package takes longer than many a kernel.
    if name == "triton" and device.type != "cuda" and not _is_interpreted(name):
        return (
            f"it is for CUDA devices, and the device is {device}. Pass kernels='auto', or, to test "
            "it on a processor, set the environment variable TRITON_INTERPRET=1 beforehand."
        )
    if name == "triton" and find_spec("triton") is None:
        return "it needs the package triton. Run: pip install triton"
    # sampled_addmm on a processor is MKL's.
    if name == "stock" and device.type != "cuda" and not torch.backends.mkl.is_available():
        return "this build of torch has no MKL. Pass kernels='auto'."
    return None


def _is_interpreted(name: str) -> bool:
    """Whether the backend's programs would be interpreted: for tests, and very slow."""
    return name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
