"""Shapes of decoders that hold equally many weights.

The arithmetic of what follows from a shape is in `superposition.theory.shapes`; here are whole
numbers, from which models can be built.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

HEAD_WIDTH = 16
"""Width of a head that `budget` comes as near to as it can."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Layers, width and heads of a decoder whose MLPs are four times as wide as its stream.

    Raises:
        ValueError: A size is not a whole number above 0, or the heads do not divide the width.
    """

    n_layers: int
    """L, blocks of attention and MLP."""
    d_model: int
    """d, width of the residual stream."""
    n_heads: int
    """Attention heads of each block; they divide d."""

    def __post_init__(self) -> None:
        for name in ("n_layers", "d_model", "n_heads"):
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name}={size!r} of a shape is not a whole number above 0.")
        if self.d_model % self.n_heads:
            raise ValueError(
                f"A width of {self.d_model} cannot be shared by {self.n_heads} heads, which do not "
                f"divide it. Divisors are {_divisors(self.d_model)}."
            )

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return self.d_model // self.n_heads

    @property
    def d_mlp(self) -> int:
        """4 d, neurons of an MLP."""
        return 4 * self.d_model

    @property
    def n_parameters(self) -> int:
        """N = 12 L d^2: the blocks' weight matrices (Kaplan et al. 2020, eq. 2.1).

        Neither embeddings and unembedding nor biases and norms.
        """
        return 12 * self.n_layers * self.d_model**2

    @property
    def aspect_ratio(self) -> float:
        """d / L."""
        return self.d_model / self.n_layers

    @property
    def label(self) -> str:
        """Layers x width, such as "8x48"."""
        return f"{self.n_layers}x{self.d_model}"


A = Shape(8, 48, 3)
"""The narrower of the pair that has exactly 221,184 parameters."""
B = Shape(2, 96, 6)
"""Twice as wide as A with as many parameters, and so a quarter of the layers."""
SHALLOWER_THAN_A = Shape(4, 68, 4)
"""Between A and B; 221,952 parameters."""
DEEPER_THAN_A = Shape(16, 34, 2)
"""Narrower than A; 221,952 parameters."""
FAMILY = (DEEPER_THAN_A, A, SHALLOWER_THAN_A, B)
"""Four aspect ratios at equal size within 0.35 %, from the narrowest to the widest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetedShape:
    """A shape that comes near to a number of parameters."""

    shape: Shape
    """What can be built."""
    mismatch_percent: float
    """Its parameters above those asked for, in per cent; negative below."""

    def __str__(self) -> str:
        one = self.shape
        return (
            f"{one.label} with {one.n_heads} heads: {one.n_parameters:,} parameters "
            f"({self.mismatch_percent:+.2f} %), aspect ratio {one.aspect_ratio:.3g}"
        )


def budget(
    n_parameters: float,
    *,
    n_layers: Sequence[int] | None = None,
    aspect_ratios: Sequence[float] | None = None,
) -> list[BudgetedShape]:
    """The shapes that come nearest to a number of parameters, one for each depth or ratio.

    N = 12 L d^2 is solved for d and rounded to the nearest whole number. Of an aspect ratio
    r = d / L, L = (N / (12 r^2))^(1/3) is rounded first. Then the heads are the divisor of d
    whose heads' width is nearest to 16 by ratio, the narrower of two as near; d is not moved for
    their sake.

    >>> print(*budget(221_184, n_layers=[8, 2]), sep="\\n")
    8x48 with 3 heads: 221,184 parameters (+0.00 %), aspect ratio 6
    2x96 with 6 heads: 221,184 parameters (+0.00 %), aspect ratio 48

    Args:
        n_parameters: N, without embeddings.
        n_layers: L of each shape.
        aspect_ratios: Or d / L of each, which whole numbers meet only nearly.

    Raises:
        ValueError: Neither or both are given, a number is not above 0, or N is so small that a
            shape would have a width of 0.
    """
    if (n_layers is None) == (aspect_ratios is None):
        raise ValueError("A budget is met for n_layers or for aspect_ratios: give one of the two.")
    wanted = n_layers if aspect_ratios is None else aspect_ratios
    for number in (n_parameters, *(wanted or ())):
        if not 0 < number < math.inf:
            raise ValueError(f"{number} is not a finite number above 0.")
    if aspect_ratios is not None:
        n_layers = [max(1, round((n_parameters / (12 * r**2)) ** (1 / 3))) for r in aspect_ratios]
    return [_nearest(n_parameters, depth) for depth in n_layers or ()]


def _nearest(n_parameters: float, n_layers: int) -> BudgetedShape:
    d_model = round(math.sqrt(n_parameters / (12 * n_layers)))
    if d_model < 1:
        raise ValueError(
            f"{n_parameters} parameters in {n_layers} layers leave a width of 0; a layer of width "
            "1 has 12. Ask for more parameters or fewer layers."
        )
    n_heads = max(_divisors(d_model), key=lambda n: (-abs(math.log(d_model / n / HEAD_WIDTH)), n))
    shape = Shape(n_layers, d_model, n_heads)
    mismatch = 100 * (shape.n_parameters / n_parameters - 1)
    return BudgetedShape(shape=shape, mismatch_percent=mismatch)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
