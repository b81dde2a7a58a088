"""Fast kernels out of stock torch operators, for processors, and for GPUs without Triton.

`embedding_bag` adds up weight rows without gathering them first, and `sampled_addmm` computes
chosen entries of a product; neither makes a temporary of `nnz * d`.
"""

import warnings
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import embedding_bag

from saefeat.kernels import eager, pursuit
from saefeat.kernels.codes import SparsityPattern

top_k = eager.top_k
batch_top_k = eager.batch_top_k
above = eager.above
latent_sums = eager.latent_sums
matching_pursuit = pursuit.matching_pursuit


@cache
def _announce_sparse_tensors() -> None:
    """Have torch give its one warning that sparse tensors are in beta, unseen.

    `sampled_addmm` takes its pattern in no other form, and the tests hold it to the reference.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        torch.sparse_csr_tensor([0, 0], [], torch.empty(0), size=(1, 1), check_invariants=False)


def sampled_product(
    pattern: SparsityPattern, left: Float[Tensor, "n d"], right: Float[Tensor, "d_sae d"]
) -> Float[Tensor, " nnz"]:
    """See `eager.sampled_product`."""
    _announce_sparse_tensors()
    mask = torch.sparse_csr_tensor(
        pattern.offsets,
        pattern.latents,
        left.new_zeros(len(pattern.latents)),
        size=(pattern.n_rows, pattern.d_sae),
        check_invariants=False,
    )
    products: Tensor = torch.sparse.sampled_addmm(mask, left, right.T, beta=0.0)
    return products.values()


def product(
    pattern: SparsityPattern, values: Float[Tensor, " nnz"], weight: Float[Tensor, "d_sae d"]
) -> Float[Tensor, "n d"]:
    """See `eager.product`."""
    return embedding_bag(
        pattern.latents,
        weight,
        pattern.offsets,
        mode="sum",
        per_sample_weights=values,
        include_last_offset=True,
    )


def transposed_product(
    pattern: SparsityPattern,
    values: Float[Tensor, " nnz"],
    rows: Float[Tensor, "n d"],
    out: Float[Tensor, "d_sae d"] | None = None,
) -> Float[Tensor, "d_sae d"]:
    """See `eager.transposed_product`."""
    offsets, order = pattern.by_latent
    sums = embedding_bag(
        pattern.rows[order],
        rows,
        offsets,
        mode="sum",
        per_sample_weights=values[order],
        include_last_offset=True,
    )
    return sums if out is None else out.add_(sums)
