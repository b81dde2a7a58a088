"""The differentiable operations of a sparse dictionary, on whichever kernels were chosen.

Which latents are on is decided before, without gradients. Everything here costs `nnz * d`, never
`n * d_sae * d`.

A weight whose `.grad` is there already gets its gradient added in place, and autograd is handed
none for it: a fresh `[d_sae, d]` a step would cost more in page faults than its arithmetic.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
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


def squared_errors(
    kernels: Kernels,
    blocks: Sequence[Codes],
    weights: Sequence[float],
    target: Float[Tensor, "n d_out"],
    decoder: Float[Tensor, "d_sae d_out"],
    b_dec: Float[Tensor, " d_out"],
) -> tuple[Float[Tensor, ""], Float[Tensor, "n d_out"]]:
    """The weighted squared errors of reconstructions that each add one block of codes.

        residual_m = target - b_dec - (blocks[0] + ... + blocks[m]) @ decoder
        loss = sum_m weights[m] * sum |residual_m|^2

    Returns:
        The loss, whose gradients reach the values of the codes, `decoder` and `b_dec`; and the
        residual of all blocks, without.
    """
    patterns = [block.pattern for block in blocks]
    values = [block.values for block in blocks]
    return _SquaredErrors.apply(kernels, patterns, weights, target, decoder, b_dec, *values)  # type: ignore[no-any-return]


def rows_of(weight: Float[Tensor, "d_sae d"], latents: Int[Tensor, " m"]) -> Float[Tensor, "m d"]:
    """`weight[latents]`, for latents without repeats."""
    return _Rows.apply(weight, latents)  # type: ignore[no-any-return]


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
        encoder_gradient = _add_to(encoder, ctx.kernels, ctx.pattern, gradient, centred)
        return None, None, None, encoder_gradient, b_enc_gradient, b_dec_gradient


class _SquaredErrors(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        patterns: Sequence[SparsityPattern],
        weights: Sequence[float],
        target: Tensor,
        decoder: Tensor,
        b_dec: Tensor,
        *values: Tensor,
    ) -> tuple[Tensor, Tensor]:
        residual = target - b_dec
        residuals, loss = [], target.new_zeros(())
        for pattern, block, weight in zip(patterns, values, weights, strict=True):
            part = kernels.product(pattern, block, decoder)
            residual = torch.sub(residual, part, out=part)
            residuals.append(residual)
            loss = loss + weight * torch.linalg.vector_norm(residual).square()
        ctx.kernels, ctx.patterns, ctx.weights = kernels, patterns, weights
        ctx.save_for_backward(decoder, *values, *residuals)
        ctx.mark_non_differentiable(residual)
        return loss, residual

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        decoder, *saved = ctx.saved_tensors
        n_blocks = len(ctx.patterns)
        values, residuals = saved[:n_blocks], saved[n_blocks:]
        scale = -2 * gradients[0]
        value_gradients: list[Tensor | None] = [None] * n_blocks
        decoder_gradient: Tensor | None = None
        last = ctx.weights[-1]
        mixed = residuals[-1] if last == 1 else last * residuals[-1]
        # A block is in the residuals from its own to the last.
        for m in reversed(range(n_blocks)):
            if m < n_blocks - 1:
                mixed = torch.add(mixed, residuals[m], alpha=ctx.weights[m])
            pattern = ctx.patterns[m]
            if ctx.needs_input_grad[6 + m]:
                value_gradients[m] = scale * ctx.kernels.sampled_product(pattern, mixed, decoder)
            if ctx.needs_input_grad[4]:
                part = _add_to(decoder, ctx.kernels, pattern, scale * values[m], mixed)
                if part is not None:
                    decoder_gradient = part if decoder_gradient is None else decoder_gradient + part
        b_dec_gradient = scale * mixed.sum(0) if ctx.needs_input_grad[5] else None
        return None, None, None, None, decoder_gradient, b_dec_gradient, *value_gradients


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, latents: Tensor) -> Tensor:
        ctx.save_for_backward(weight, latents)
        return weight[latents]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, latents = ctx.saved_tensors
        buffer = _gradient_buffer(weight)
        out = torch.zeros_like(weight) if buffer is None else buffer
        out.index_add_(0, latents, gradients[0])
        return (out if buffer is None else None), None


def _gradient_buffer(weight: Tensor) -> Tensor | None:
    return weight.grad if weight.is_leaf else None


def _add_to(
    weight: Tensor, kernels: Kernels, pattern: SparsityPattern, values: Tensor, rows: Tensor
) -> Tensor | None:
    """The transposed product, added to the gradient that `weight` has; else returned."""
    buffer = _gradient_buffer(weight)
    out = kernels.transposed_product(pattern, values, rows, buffer)
    return out if buffer is None else None
