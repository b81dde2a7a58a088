"""What a small decoder computes between its matrix products, forward and backward.

torch's operators pass over memory once for each of bias, activation and conversion, and its
attention takes as long as all matrix products of a model this narrow. Here each is one loop.
Arrays that products read or write (`Any` below) are float32, or bfloat16 as the int16 of the same
bits, which numba does not know; sums are in float32.

Shape letters: t tokens (b contexts of s), d width, m hidden width, v vocabulary, h heads.
"""

from typing import Any

import numba
import numpy as np
from numba.extending import overload

from saefeat.kernels.compiled import compiled

_ONE = np.float32(1)
_HALF = np.float32(0.5)
_LOG2_E = np.float32(1.4426950408889634)
_LEAST, _MOST = np.float32(-87), np.float32(88)
_CUBIC = np.float32(0.044715)
_SLOPE = np.float32(2 * (2 / np.pi) ** 0.5)
_EPSILON = np.float32(1e-5)
"""As in `torch.nn.LayerNorm` and GPT-2."""


def _float(entry: Any) -> Any:
    """An entry of an array as a float32."""


def _entry(array: Any, value: Any) -> Any:
    """A float32 as an entry of an array."""


@overload(_float, strict=False)
def _compile_float(entry: Any) -> Any:
    if entry == numba.int16:
        return lambda entry: np.int32(np.int32(entry) << np.int32(16)).view(np.float32)
    return lambda entry: entry


@compiled
def _rounded(value: Any) -> Any:
    """The int16 of the nearest bfloat16, and of two as near of the even one."""
    bits = np.float32(value).view(np.int32)
    odd = (bits >> np.int32(16)) & np.int32(1)
    return np.int16((bits + np.int32(0x7FFF) + odd) >> np.int32(16))


@overload(_entry, strict=False)
def _compile_entry(array: Any, value: Any) -> Any:
    if array.dtype == numba.int16:
        return lambda array, value: _rounded(value)
    return lambda array, value: value


@compiled
def _exp(x: Any) -> Any:
    """e^x within 1e-6 of its value, in instructions that work on whole vector registers."""
    x = min(max(x, _LEAST), _MOST) * _LOG2_E
    whole = np.floor(x + _HALF)
    x = x - whole
    # 2^x on [-1/2, 1/2] (Cephes, exp2f).
    p = np.float32(1.535336188319500e-4)
    p = p * x + np.float32(1.339887440266574e-3)
    p = p * x + np.float32(9.618437357674640e-3)
    p = p * x + np.float32(5.550332471162809e-2)
    p = p * x + np.float32(2.402264791363012e-1)
    p = p * x + np.float32(6.931472028550421e-1)
    p = p * x + _ONE
    return np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32) * p


@compiled
def _highest(row: Any) -> Any:
    """The largest of some float32s, or NaN if there is one.

    By integers in the same order: of floats, which NaN gives none, the largest is not found
    by vector instructions.
    """
    best = np.int32(np.iinfo(np.int32).min)
    for i in range(len(row)):
        bits = np.float32(row[i]).view(np.int32)
        best = max(best, np.int32(bits if bits >= 0 else bits ^ np.int32(0x7FFFFFFF)))
    return np.int32(best if best >= 0 else best ^ np.int32(0x7FFFFFFF)).view(np.float32)


@compiled
def embed(ids: Any, tokens: Any, positions: Any, out: Any) -> None:
    """out [t, d] = tokens[ids] + positions, for ids [b, s]."""
    s, d = ids.shape[1], tokens.shape[1]
    for context in range(ids.shape[0]):
        for place in range(s):
            token, row = ids[context, place], context * s + place
            for i in range(d):
                out[row, i] = tokens[token, i] + positions[place, i]


@compiled
def embed_backward(ids: Any, gradient: Any, tokens: Any, positions: Any) -> None:
    """The gradient [t, d] of `embed`'s result, added up into those of both its tables."""
    tokens[:], positions[:] = 0, 0
    s, d = ids.shape[1], tokens.shape[1]
    for context in range(ids.shape[0]):
        for place in range(s):
            token, row = ids[context, place], context * s + place
            for i in range(d):
                tokens[token, i] += gradient[row, i]
                positions[place, i] += gradient[row, i]


@compiled
def add(stream: Any, update: Any, bias: Any, out: Any) -> None:
    """out = stream + update + bias, all but the bias [t, d]."""
    for row in range(stream.shape[0]):
        for i in range(stream.shape[1]):
            out[row, i] = stream[row, i] + (_float(update[row, i]) + bias[i])


@compiled
def layer_norm(x: Any, gain: Any, bias: Any, statistics: Any, out: Any) -> None:
    """out [t, d] = (x - mean) / deviation * gain + bias; statistics [t, 2] for the way back."""
    d = x.shape[1]
    share = _ONE / np.float32(d)
    for row in range(x.shape[0]):
        total = np.float32(0)
        for i in range(d):
            total += x[row, i]
        mean = total * share
        total = np.float32(0)
        for i in range(d):
            total += (x[row, i] - mean) * (x[row, i] - mean)
        scale = _ONE / np.sqrt(total * share + _EPSILON)
        statistics[row, 0], statistics[row, 1] = mean, scale
        for i in range(d):
            out[row, i] = _entry(out, (x[row, i] - mean) * scale * gain[i] + bias[i])


@compiled
def layer_norm_backward(
    gradient: Any,
    x: Any,
    gain: Any,
    statistics: Any,
    stream: Any,
    rounded: Any,
    d_gain: Any,
    d_bias: Any,
) -> None:
    """Adds the gradient with respect to x to `stream` [t, d], which is copied to `rounded`."""
    d = x.shape[1]
    share = _ONE / np.float32(d)
    d_gain[:], d_bias[:] = 0, 0
    for row in range(x.shape[0]):
        mean, scale = statistics[row, 0], statistics[row, 1]
        total, product = np.float32(0), np.float32(0)
        for i in range(d):
            g, normal = _float(gradient[row, i]), (x[row, i] - mean) * scale
            d_gain[i] += g * normal
            d_bias[i] += g
            total += g * gain[i]
            product += g * gain[i] * normal
        total, product = total * share, product * share
        for i in range(d):
            normal = (x[row, i] - mean) * scale
            g = _float(gradient[row, i]) * gain[i] - total - normal * product
            value = stream[row, i] + g * scale
            stream[row, i] = value
            rounded[row, i] = _entry(rounded, value)


@compiled
def gelu(x: Any, bias: Any, out: Any) -> None:
    """out [t, m] = z / (1 + exp(-2u)), u = sqrt(2/pi) (z + 0.044715 z^3), z = x + bias.

    That is GPT-2's z/2 (1 + tanh u) (Hendrycks & Gimpel 2016).
    """
    for row in range(x.shape[0]):
        for i in range(x.shape[1]):
            z = _float(x[row, i]) + bias[i]
            u = _SLOPE * (z + _CUBIC * z * z * z)
            out[row, i] = _entry(out, z / (_ONE + _exp(-u)))


@compiled
def gelu_backward(x: Any, bias: Any, gradient: Any, d_bias: Any) -> None:
    """Turns the gradient [t, m] of `gelu`'s result into that of its argument, in place."""
    d_bias[:] = 0
    for row in range(x.shape[0]):
        for i in range(x.shape[1]):
            z = _float(x[row, i]) + bias[i]
            u = _SLOPE * (z + _CUBIC * z * z * z)
            gate = _ONE / (_ONE + _exp(-u))
            slope = _SLOPE * (_ONE + np.float32(3) * _CUBIC * z * z)
            value = _float(gradient[row, i]) * (gate + z * gate * (_ONE - gate) * slope)
            d_bias[i] += value
            gradient[row, i] = _entry(gradient, value)


@compiled
def column_sums(x: Any, out: Any) -> None:
    """out [d] = sum over the rows of x [t, d]."""
    out[:] = 0
    for row in range(x.shape[0]):
        for i in range(x.shape[1]):
            out[i] += _float(x[row, i])


@compiled
def split_heads(joined: Any, bias: Any, heads: Any) -> None:
    """heads [3, b, h, s, d_head] of joined [t, 3 d] + bias: queries, keys and values."""
    n, n_contexts, n_heads, s, d_head = heads.shape
    for part in range(n):
        for context in range(n_contexts):
            for head in range(n_heads):
                start = (part * n_heads + head) * d_head
                for place in range(s):
                    for i in range(d_head):
                        value = _float(joined[context * s + place, start + i]) + bias[start + i]
                        heads[part, context, head, place, i] = _entry(heads, value)


@compiled
def causal_softmax(scores: Any, scale: float) -> None:
    """Scores [b h, s, s] to the shares of the positions up to each one, in place."""
    factor = np.float32(scale)
    s = scores.shape[1]
    row = np.empty(s, np.float32)
    for block in range(scores.shape[0]):
        for place in range(s):
            for i in range(s):
                value = _float(scores[block, place, i]) * factor
                row[i] = value if i <= place else np.float32(-np.inf)
            highest = _highest(row)
            total = np.float32(0)
            for i in range(s):
                value = _exp(row[i] - highest)
                value = value if i <= place else np.float32(0)
                row[i] = value
                total += value
            share = _ONE / total
            for i in range(s):
                scores[block, place, i] = _entry(scores, row[i] * share)


@compiled
def causal_softmax_backward(shares: Any, gradient: Any, scale: float) -> None:
    """Turns the gradient [b h, s, s] of the shares into that of the scores, in place."""
    factor = np.float32(scale)
    s = shares.shape[1]
    for block in range(shares.shape[0]):
        for place in range(s):
            total = np.float32(0)
            for i in range(s):
                total += _float(shares[block, place, i]) * _float(gradient[block, place, i])
            for i in range(s):
                g = (_float(gradient[block, place, i]) - total) * factor
                gradient[block, place, i] = _entry(gradient, _float(shares[block, place, i]) * g)


@compiled
def cross_entropy(logits: Any, targets: Any, backward: bool) -> float:
    """Sum over t of the loss in nats; with `backward`, logits [t, v] get gradients of the mean."""
    n, v = logits.shape
    row = np.empty(v, np.float32)
    loss = 0.0
    share = _ONE / np.float32(n)
    for t in range(n):
        for i in range(v):
            row[i] = _float(logits[t, i])
        highest = _highest(row)
        total = np.float32(0)
        target = row[targets[t]]
        for i in range(v):
            row[i] = _exp(row[i] - highest)
            total += row[i]
        loss += np.log(total) + highest - target
        if backward:
            factor = share / total
            for i in range(v):
                logits[t, i] = _entry(logits, row[i] * factor)
            i = targets[t]
            logits[t, i] = _entry(logits, row[i] * factor - share)
    return loss
