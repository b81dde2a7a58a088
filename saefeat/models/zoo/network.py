"""The forward and backward pass of a GPT-2 decoder, for training small ones fast on a processor.

What it computes is what transformers' GPT2LMHeadModel does (Radford et al. 2019: pre-norm blocks,
learnt positions, tanh GELU) with an unembedding of its own, and autograd's gradients of it; the
parameters bear that model's names. Buffers are made once, and all parameters lie in one vector.

Shape letters: b contexts of s tokens, t = b s, d width, m = 4 d, h heads, v vocabulary.
"""

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saefeat.kernels import compiled_decoder as loops
from saefeat.models.zoo.shapes import Shape

Array = npt.NDArray[Any]


def parameter_sizes(
    shape: Shape, vocabulary_size: int, context_size: int
) -> dict[str, tuple[int, ...]]:
    """Sizes of all parameters by GPT-2's names; matrices that products read come first."""
    d, m = shape.d_model, shape.d_mlp
    matrices: dict[str, tuple[int, ...]] = {}
    others: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (vocabulary_size, d),
        "transformer.wpe.weight": (context_size, d),
    }
    for layer in range(shape.n_layers):
        for name, size in {
            "attn.c_attn": (d, 3 * d),
            "attn.c_proj": (d, d),
            "mlp.c_fc": (d, m),
            "mlp.c_proj": (m, d),
        }.items():
            matrices[f"transformer.h.{layer}.{name}.weight"] = size
            others[f"transformer.h.{layer}.{name}.bias"] = (size[1],)
        for name in ("ln_1", "ln_2"):
            others[f"transformer.h.{layer}.{name}.weight"] = (d,)
            others[f"transformer.h.{layer}.{name}.bias"] = (d,)
    others["transformer.ln_f.weight"] = others["transformer.ln_f.bias"] = (d,)
    matrices["lm_head.weight"] = (vocabulary_size, d)
    return matrices | others


def named_views(
    vector: Float[Tensor, " n"], sizes: dict[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The parameters that lie in a vector one after the other; each shares its memory."""
    pieces = vector.split([math.prod(size) for size in sizes.values()])
    return {name: piece.view(sizes[name]) for name, piece in zip(sizes, pieces, strict=True)}


class Network:
    """A decoder's loss and its gradients for batches of one size.

    Args:
        weights: All parameters, in the order of `parameter_sizes`; read at each call.
        n_contexts: b, contexts in a batch.
        dtype: bfloat16 for products in it (sums, norms and the residual stream stay float32), or
            float32.
        backward: Whether to make the buffers that gradients take.
    """

    def __init__(
        self,
        shape: Shape,
        weights: Float[Tensor, " n"],
        *,
        vocabulary_size: int,
        context_size: int,
        n_contexts: int,
        dtype: torch.dtype,
        backward: bool = True,
    ) -> None:
        self.shape, self.weights, self.dtype = shape, weights, dtype
        sizes = parameter_sizes(shape, vocabulary_size, context_size)
        self._batch = (n_contexts, context_size)
        self._values = _arrays(named_views(weights, sizes))
        # Four of each layer, and the unembedding.
        matrices = dict(list(sizes.items())[: 4 * shape.n_layers + 1])
        self.n_matrix_weights = sum(math.prod(size) for size in matrices.values())
        self._rounded = weights[: self.n_matrix_weights]
        if dtype != torch.float32:
            self._rounded = self._rounded.to(dtype)
        self._matrices = named_views(self._rounded, matrices)
        if backward:
            self.gradient = torch.zeros_like(weights)
            self._gradients = _arrays(named_views(self.gradient, sizes))
            self._rounded_gradient = self.gradient[: self.n_matrix_weights]
            if dtype != torch.float32:
                self._rounded_gradient = self._rounded_gradient.to(dtype)
            self._matrix_gradients = named_views(self._rounded_gradient, matrices)
        self._make_buffers(vocabulary_size, backward)

    def _make_buffers(self, vocabulary_size: int, backward: bool) -> None:
        (b, s), one = self._batch, self.shape
        t, d, m, h, w = b * s, one.d_model, one.d_mlp, one.n_heads, one.d_head

        def rounded(*size: int) -> Tensor:
            return torch.empty(size, dtype=self.dtype)

        # Without a way back, one layer's buffers serve all.
        n_kept = one.n_layers if backward else 1
        self._kept = [
            {
                "before attention": torch.empty(t, d),
                "before mlp": torch.empty(t, d),
                "norms 1": torch.empty(t, 2),
                "norms 2": torch.empty(t, 2),
                "normed 1": rounded(t, d),
                "normed 2": rounded(t, d),
                "heads": rounded(3, b, h, s, w),
                "shares": rounded(b * h, s, s),
                "attended": rounded(t, d),
                "hidden": rounded(t, m),
                "active": rounded(t, m),
            }
            for _ in range(n_kept)
        ]
        self._shared = {
            "last": torch.empty(t, d),
            "last norms": torch.empty(t, 2),
            "last normed": rounded(t, d),
            "logits": rounded(t, vocabulary_size),
            "joined": rounded(t, 3 * d),
            "update": rounded(t, d),
            "head out": rounded(b * h, s, w),
        }
        if backward:
            self._shared |= {
                "stream": torch.empty(t, d),
                "stream rounded": rounded(t, d),
                "d hidden": rounded(t, m),
                "d scores": rounded(b * h, s, s),
                "d heads": rounded(3, b * h, s, w),
            }
        self._shared_arrays = _arrays(self._shared)
        self._kept_arrays = [_arrays(kept) for kept in self._kept]
        # The stream after a layer is that before the next.
        for kept, after in pairwise([*self._kept_arrays, self._shared_arrays]):
            kept["after"] = after["last" if "last" in after else "before attention"]

    def _layers(self) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Array]]]:
        """Of each layer: the prefix of its names, what is kept of it, and the same as arrays."""
        last = self.shape.n_layers - 1
        for layer in range(last + 1):
            if len(self._kept) > 1 or last == 0:
                yield f"transformer.h.{layer}.", self._kept[layer], self._kept_arrays[layer]
                continue
            arrays = self._kept_arrays[0]
            after = self._shared_arrays["last"] if layer == last else arrays["before attention"]
            yield f"transformer.h.{layer}.", self._kept[0], arrays | {"after": after}

    def loss(self, ids: Int[Tensor, "b s"], targets: Int[Tensor, "b s"]) -> float:
        """Mean cross-entropy of the targets, in nats."""
        self._forward(ids)
        logits = self._shared_arrays["logits"]
        return float(loops.cross_entropy(logits, _flat(targets), False)) / targets.numel()

    def logits(self, ids: Int[Tensor, "b s"]) -> Float[Tensor, "b s v"]:
        """What the model says of the next token; the next call overwrites it."""
        self._forward(ids)
        return self._shared["logits"].view(*self._batch, -1)

    def loss_and_gradient(self, ids: Int[Tensor, "b s"], targets: Int[Tensor, "b s"]) -> float:
        """Mean cross-entropy in nats; `gradient` then holds its gradient."""
        self._forward(ids)
        total = float(loops.cross_entropy(self._shared_arrays["logits"], _flat(targets), True))
        self._backward(ids)
        return total / targets.numel()

    def _forward(self, ids: Int[Tensor, "b s"]) -> None:
        (b, s), one, values, shared = self._batch, self.shape, self._values, self._shared
        if self.dtype != torch.float32:
            self._rounded.copy_(self.weights[: self.n_matrix_weights])
        matrices, scale, shared_arrays = self._matrices, one.d_head**-0.5, self._shared_arrays
        by_head = shared["head out"].view(b, one.n_heads, s, one.d_head).transpose(1, 2)
        loops.embed(
            ids.numpy(),
            values["transformer.wte.weight"],
            values["transformer.wpe.weight"],
            self._kept_arrays[0]["before attention"],
        )
        for name, kept, arrays in self._layers():
            self._norm(f"{name}ln_1", arrays, "before attention", "norms 1", "normed 1")
            weight = matrices[f"{name}attn.c_attn.weight"]
            torch.mm(kept["normed 1"], weight, out=shared["joined"])
            bias = values[f"{name}attn.c_attn.bias"]
            loops.split_heads(shared_arrays["joined"], bias, arrays["heads"])
            queries, keys, head_values = kept["heads"].flatten(1, 2).unbind()
            torch.bmm(queries, keys.transpose(1, 2), out=kept["shares"])
            loops.causal_softmax(arrays["shares"], scale)
            torch.bmm(kept["shares"], head_values, out=shared["head out"])
            kept["attended"].view(by_head.shape).copy_(by_head)
            torch.mm(kept["attended"], matrices[f"{name}attn.c_proj.weight"], out=shared["update"])
            self._add(f"{name}attn.c_proj", arrays, "before attention", "before mlp")

            self._norm(f"{name}ln_2", arrays, "before mlp", "norms 2", "normed 2")
            torch.mm(kept["normed 2"], matrices[f"{name}mlp.c_fc.weight"], out=kept["hidden"])
            loops.gelu(arrays["hidden"], values[f"{name}mlp.c_fc.bias"], arrays["active"])
            torch.mm(kept["active"], matrices[f"{name}mlp.c_proj.weight"], out=shared["update"])
            self._add(f"{name}mlp.c_proj", arrays, "before mlp", "after")
        self._norm("transformer.ln_f", shared_arrays, "last", "last norms", "last normed")
        torch.mm(shared["last normed"], matrices["lm_head.weight"].T, out=shared["logits"])

    def _norm(self, name: str, arrays: dict[str, Array], x: str, norms: str, out: str) -> None:
        gain, bias = self._values[f"{name}.weight"], self._values[f"{name}.bias"]
        loops.layer_norm(arrays[x], gain, bias, arrays[norms], arrays[out])

    def _add(self, name: str, arrays: dict[str, Array], stream: str, out: str) -> None:
        """The stream and a block's update, which lacks its bias."""
        update, bias = self._shared_arrays["update"], self._values[f"{name}.bias"]
        loops.add(arrays[stream], update, bias, arrays[out])

    def _backward(self, ids: Int[Tensor, "b s"]) -> None:
        (b, s), one, values, shared = self._batch, self.shape, self._values, self._shared
        gradients, shared_arrays = self._gradients, self._shared_arrays
        by_place = (b, s, one.n_heads, one.d_head)
        d_update, d_hidden, d_scores = shared["update"], shared["d hidden"], shared["d scores"]
        d_out, d_heads, d_joined = shared["head out"], shared["d heads"], shared["joined"]
        stream, normed = shared["stream rounded"], shared["last normed"]
        shared["stream"].zero_()
        torch.mm(shared["logits"].T, normed, out=self._matrix_gradients["lm_head.weight"])
        torch.mm(shared["logits"], self._matrices["lm_head.weight"], out=d_update)
        self._norm_backward("transformer.ln_f", shared_arrays, "last", "last norms")
        for name, kept, arrays in reversed(list(self._layers())):
            loops.column_sums(shared_arrays["stream rounded"], gradients[f"{name}mlp.c_proj.bias"])
            self._product_backward(f"{name}mlp.c_proj", kept["active"], stream, d_hidden)
            bias, d_bias = values[f"{name}mlp.c_fc.bias"], gradients[f"{name}mlp.c_fc.bias"]
            loops.gelu_backward(arrays["hidden"], bias, shared_arrays["d hidden"], d_bias)
            self._product_backward(f"{name}mlp.c_fc", kept["normed 2"], d_hidden, d_update)
            self._norm_backward(f"{name}ln_2", arrays, "before mlp", "norms 2")

            loops.column_sums(shared_arrays["stream rounded"], gradients[f"{name}attn.c_proj.bias"])
            self._product_backward(f"{name}attn.c_proj", kept["attended"], stream, d_update)
            of_heads = d_update.view(by_place).transpose(1, 2)
            d_out.view(of_heads.shape).copy_(of_heads)
            queries, keys, head_values = kept["heads"].flatten(1, 2).unbind()
            torch.bmm(d_out, head_values.transpose(1, 2), out=d_scores)
            torch.bmm(kept["shares"].transpose(1, 2), d_out, out=d_heads[2])
            scale = one.d_head**-0.5
            loops.causal_softmax_backward(arrays["shares"], shared_arrays["d scores"], scale)
            torch.bmm(d_scores, keys, out=d_heads[0])
            torch.bmm(d_scores.transpose(1, 2), queries, out=d_heads[1])
            of_places = d_heads.view(3, *of_heads.shape).permute(1, 3, 0, 2, 4)
            d_joined.view(of_places.shape).copy_(of_places)
            loops.column_sums(shared_arrays["joined"], gradients[f"{name}attn.c_attn.bias"])
            self._product_backward(f"{name}attn.c_attn", kept["normed 1"], d_joined, d_update)
            self._norm_backward(f"{name}ln_1", arrays, "before attention", "norms 1")
        loops.embed_backward(
            ids.numpy(),
            shared_arrays["stream"],
            gradients["transformer.wte.weight"],
            gradients["transformer.wpe.weight"],
        )
        if self.dtype != torch.float32:
            self.gradient[: self.n_matrix_weights].copy_(self._rounded_gradient)

    def _product_backward(self, name: str, x: Tensor, gradient: Tensor, d_x: Tensor) -> None:
        """Of x W: the gradient of W is kept, that of x is written to `d_x`."""
        torch.mm(x.T, gradient, out=self._matrix_gradients[f"{name}.weight"])
        torch.mm(gradient, self._matrices[f"{name}.weight"].T, out=d_x)

    def _norm_backward(self, name: str, arrays: dict[str, Array], x: str, norms: str) -> None:
        """Adds what the gradient of the norm's result, "update", makes of the stream's."""
        loops.layer_norm_backward(
            self._shared_arrays["update"],
            arrays[x],
            self._values[f"{name}.weight"],
            arrays[norms],
            self._shared_arrays["stream"],
            self._shared_arrays["stream rounded"],
            self._gradients[f"{name}.weight"],
            self._gradients[f"{name}.bias"],
        )


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    """What the loops read: bfloat16 as the integers of the same bits, which numpy lacks."""
    return {
        name: (one.view(torch.int16) if one.dtype == torch.bfloat16 else one).numpy()
        for name, one in tensors.items()
    }


def _flat(targets: Int[Tensor, "b s"]) -> Array:
    array: Array = targets.reshape(-1).numpy()
    return array
