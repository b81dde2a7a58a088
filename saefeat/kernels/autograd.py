"""The two differentiable operations of a sparse dictionary, on whichever kernels were chosen.

Which latents are on is decided before, without gradients. Everything here costs `nnz * d`, never
`n * d_sae * d`.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saefeat.kernels.codes import Codes, SparsityPattern
from saefeat.kernels.dispatch import Kernels


def sparse_encode(
    kernels: Kernels,
    pattern: SparsityPattern,
    x: Float[Tensor, "n d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    b_dec: Float[Tensor, " d_in"] | None = None,
) -> Float[Tensor, " nnz"]:
    """Pre-activations `(x - b_dec) @ encoder.T + b_enc` at the entries of `pattern` alone.

    Gradients reach `encoder`, `b_enc` and `b_dec`; `x` is data and gets none.
    """
    return _SparseEncode.apply(kernels, pattern, x, encoder, b_enc, b_dec)  # type: ignore[no-any-return]


def sparse_decode(
    kernels: Kernels,
    codes: Codes,
    decoder: Float[Tensor, "d_sae d_out"],
    b_dec: Float[Tensor, " d_out"],
) -> Float[Tensor, "n d_out"]:
    """`codes @ decoder + b_dec`. Gradients reach the code values, `decoder` and `b_dec`."""
    return _SparseDecode.apply(kernels, codes.pattern, codes.values, decoder, b_dec)  # type: ignore[no-any-return]


class _SparseEncode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        pattern: SparsityPattern,
        x: Tensor,
        encoder: Tensor,
        b_enc: Tensor,
        b_dec: Tensor | None,
    ) -> Tensor:
        centred = x if b_dec is None else x - b_dec
        ctx.kernels, ctx.pattern = kernels, pattern
        ctx.save_for_backward(centred, encoder)
        return kernels.sampled_product(pattern, centred, encoder) + b_enc[pattern.latents]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        centred, encoder = ctx.saved_tensors
        b_enc_gradient = ctx.kernels.latent_sums(ctx.pattern, gradient)
        # Summed over rows, the gradient of (x - b_dec) is this one vector-matrix product.
        b_dec_gradient = -(b_enc_gradient @ encoder) if ctx.needs_input_grad[5] else None
        encoder_gradient = ctx.kernels.transposed_product(ctx.pattern, gradient, centred)
        return None, None, None, encoder_gradient, b_enc_gradient, b_dec_gradient


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        pattern: SparsityPattern,
        values: Tensor,
        decoder: Tensor,
        b_dec: Tensor,
    ) -> Tensor:
        ctx.kernels, ctx.pattern = kernels, pattern
        ctx.save_for_backward(values, decoder)
        return kernels.product(pattern, values, decoder).add_(b_dec)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        values, decoder = ctx.saved_tensors
        gradient = gradient.contiguous()
        return (
            None,
            None,
            ctx.kernels.sampled_product(ctx.pattern, gradient, decoder)
            if ctx.needs_input_grad[2]
            else None,
            ctx.kernels.transposed_product(ctx.pattern, values, gradient),
            gradient.sum(0),
        )
