"""Which kernels run: decided once, by device and by what is installed, and written down."""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saefeat.kernels import eager, stock
from saefeat.kernels.codes import Codes, SparsityPattern


@runtime_checkable
class Kernels(Protocol):
    """What a backend module offers; `eager` documents each function."""

    def top_k(self, scores: Float[Tensor, "n d_sae"], k: int) -> Int[Tensor, "n k"]: ...

    def batch_top_k(
        self, scores: Float[Tensor, "n d_sae"], n_kept: int
    ) -> tuple[SparsityPattern, Float[Tensor, ""]]: ...

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
    ) -> Codes: ...


BACKENDS: dict[str, Kernels] = {"eager": eager, "stock": stock}


def choose_kernels(name: str, device: torch.device) -> tuple[str, Kernels]:
    """The backend called `name`, or for "auto" the fastest that this device has.

    Returns:
        The backend's name, to be written into the run's config, and the backend.

    Raises:
        ValueError: No backend is called `name`, or it cannot run on `device`.
    """
    # sampled_addmm on a processor is MKL's.
    stock_runs = device.type == "cuda" or torch.backends.mkl.is_available()
    if name == "auto":
        name = "stock" if stock_runs else "eager"
    if name not in BACKENDS:
        raise ValueError(f"kernels must be 'auto' or one of {sorted(BACKENDS)}, got {name!r}.")
    if name == "stock" and not stock_runs:
        raise ValueError(
            "kernels='stock' needs a torch built with MKL, and this build has none. "
            "Pass kernels='eager' (slower, same results)."
        )
    return name, BACKENDS[name]
