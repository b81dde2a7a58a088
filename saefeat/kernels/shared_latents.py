"""Operations of processes that hold parts of the latents of one dictionary, and all rows.

They are what Megatron-LM calls f and g (Shoeybi et al. 2019, arXiv:1909.08053): where a replicated
tensor is used by every part, its gradients are added up; where parts make a sum, the sum is
replicated and its gradient belongs to each.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saefeat.core.distributed import Ranks
from saefeat.kernels.codes import SparsityPattern
from saefeat.kernels.dispatch import Kernels


def summed_gradient(tensor: Float[Tensor, "..."], ranks: Ranks) -> Float[Tensor, "..."]:
    """The tensor itself, which every process has; its gradient is the sum of all of theirs."""
    return tensor if ranks.size == 1 else _SummedGradient.apply(tensor, ranks)


def summed_value(tensor: Float[Tensor, "..."], ranks: Ranks) -> Float[Tensor, "..."]:
    """The sum over all processes, of a tensor of which each has a part."""
    return tensor if ranks.size == 1 else _SummedValue.apply(tensor, ranks)


class SummedProducts:
    """Kernels of a process that holds some of the latents: decoding adds up those of all.

    Everything else concerns its own latents alone. See `Kernels`.
    """

    def __init__(self, kernels: Kernels, ranks: Ranks) -> None:
        self._kernels = kernels
        self._ranks = ranks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)

    def product(
        self,
        pattern: SparsityPattern,
        values: Float[Tensor, " nnz"],
        weight: Float[Tensor, "d_sae d"],
    ) -> Float[Tensor, "n d"]:
        """The rows that the codes of all processes decode to together."""
        return self._ranks.sum(self._kernels.product(pattern, values, weight).contiguous())


class _SummedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.ranks.sum(gradients[0].contiguous()), None


class _SummedValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks) -> Tensor:
        return ranks.sum(tensor.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None
