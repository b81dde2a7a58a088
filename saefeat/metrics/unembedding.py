"""Which tokens a direction of the residual stream promotes."""

import re
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

RESIDUAL_HOOK = re.compile(
    r"blocks\.\d+\.(hook_resid_(pre|mid|post)|hook_(attn|mlp)_out|hook_in|hook_out)"
)
"""Hooks whose activations are the residual stream, or are added to it."""
COLUMNS_AT_ONCE = 8192
"""Tokens of the vocabulary whose logits are in memory at once."""


def reaches_unembedding(model: Any, hook_name: str, width: int) -> bool:
    """Whether what a hook holds goes straight into the final norm and the unembedding.

    It does in the residual stream of decoders. Encoders have a head of their own in between.
    """
    return (
        RESIDUAL_HOOK.fullmatch(hook_name) is not None
        and hasattr(model, "W_U")
        and hasattr(model, "ln_final")
        and not hasattr(model, "mlm_head")
        and model.W_U.shape[0] == width
    )


@torch.no_grad()
def promoted_tokens(
    model: Any, directions: Float[Tensor, "m d"], n_tokens: int = 8
) -> tuple[Int[Tensor, "m t"], Float[Tensor, "m t"]]:
    """The tokens whose logits each direction raises most, and by how much.

        logits_i = (norm(x_i) - norm(-x_i)) / 2 @ W_U,    x_i = sqrt(d) d_i / |d_i|

    with the model's own final norm: the logit lens (nostalgebraist 2020) of a direction alone.
    The difference leaves out the norm's bias, which has nothing to do with the direction.

    Returns:
        Ids [m, t], highest first, and their logits; t is `n_tokens`, or the vocabulary if fewer.
    """
    unembedding = model.W_U
    width = directions.shape[1]
    x = torch.nn.functional.normalize(directions.detach(), dim=1) * width**0.5
    x = x.to(unembedding)[None]
    lensed = (model.ln_final(x) - model.ln_final(-x))[0].float() / 2
    logits, ids = [], []
    # In pieces, so that no [m, vocabulary] array and no float32 copy of the unembedding is made.
    for start in range(0, unembedding.shape[1], COLUMNS_AT_ONCE):
        piece = lensed @ unembedding[:, start : start + COLUMNS_AT_ONCE].float()
        best = piece.topk(min(n_tokens, piece.shape[1]), dim=1)
        logits.append(best.values)
        ids.append(best.indices + start)
    chosen = torch.cat(logits, dim=1).topk(min(n_tokens, unembedding.shape[1]), dim=1)
    return torch.cat(ids, dim=1).gather(1, chosen.indices).int().cpu(), chosen.values.cpu()
