"""Random numbers that a key decides, wherever they are drawn in a program's run."""

from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class RandomDraws(Protocol):
    """A sequence of random numbers. Tensors are new, and on the device of the draws."""

    def exponential(self, n: int) -> Float[Tensor, " n"]:
        """Of mean 1, in float64."""
        ...

    def uniform(self, n: int) -> Float[Tensor, " n"]:
        """From 0 up to 1, in float32."""
        ...

    def normal(self, *shape: int) -> Float[Tensor, "..."]:
        """Of mean 0 and variance 1, in float32."""
        ...


def draws_of(key: tuple[int, ...], device: torch.device) -> RandomDraws:
    """The sequence that belongs to a key: the same every time, unlike that of any other key.

    It is another one on a processor than on a GPU, whose generator is not the same, and may be
    another one in another version of numpy or torch.
    """
    seeds = np.random.SeedSequence(key[0], spawn_key=key[1:])
    if device.type == "cpu":
        return _NumpyDraws(np.random.Generator(np.random.SFC64(seeds)))
    # Not for the processor too: of a seed, torch's generator there reads 32 bits only, and among
    # a hundred thousand blocks of rows two would be equal.
    seed = int(seeds.generate_state(1, np.uint64)[0] >> np.uint64(1))
    return _TorchDraws(torch.Generator(device).manual_seed(seed))


class _NumpyDraws:
    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator

    def exponential(self, n: int) -> Float[Tensor, " n"]:
        return torch.from_numpy(self._generator.standard_exponential(n))

    def uniform(self, n: int) -> Float[Tensor, " n"]:
        return torch.from_numpy(self._generator.random(n, dtype=np.float32))

    def normal(self, *shape: int) -> Float[Tensor, "..."]:
        return torch.from_numpy(self._generator.standard_normal(shape, dtype=np.float32))


class _TorchDraws:
    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._device = generator.device

    def exponential(self, n: int) -> Float[Tensor, " n"]:
        empty = torch.empty(n, dtype=torch.float64, device=self._device)
        return empty.exponential_(generator=self._generator)

    def uniform(self, n: int) -> Float[Tensor, " n"]:
        return torch.rand(n, generator=self._generator, device=self._device)

    def normal(self, *shape: int) -> Float[Tensor, "..."]:
        return torch.randn(shape, generator=self._generator, device=self._device)
