"""A buffer that mixes rows of activations, at a cost that does not grow with its size."""

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor


class ShuffleBuffer:
    """Holds rows, aligned across hooks, and gives random ones away.

    The rows lie side by side in tensors that are allocated once. Those taken are drawn
    without replacement, and their places are filled with rows from the end: taking n rows
    moves at most 2n of them, however many the buffer holds. So each row added is given
    exactly once. The state is all in `rows` and `size`; randomness comes from the caller.
    """

    def __init__(self, capacity: int) -> None:
        """Memory for `capacity` rows is taken when the first of them come."""
        self.capacity = capacity
        self.size = 0
        self.rows: dict[str, Tensor] = {}

    def add(self, rows: dict[str, Shaped[Tensor, "n ..."]]) -> None:
        """Copies rows in, the same n at every hook.

        Raises:
            ValueError: There is no room for them.
        """
        n_added = len(next(iter(rows.values())))
        if self.size + n_added > self.capacity:
            raise ValueError(
                f"{n_added} rows do not fit: the buffer holds {self.size} of {self.capacity}."
            )
        for name, values in rows.items():
            if name not in self.rows:
                self.rows[name] = values.new_empty(self.capacity, *values.shape[1:])
            self.rows[name][self.size : self.size + n_added] = values
        self.size += n_added

    def take(self, n: int, generator: np.random.Generator) -> dict[str, Shaped[Tensor, "n ..."]]:
        """Removes n random rows, in random order, and returns them as new tensors.

        Raises:
            ValueError: The buffer holds fewer.
        """
        if n > self.size:
            raise ValueError(f"{n} rows were asked for, but the buffer holds {self.size}.")
        # Costs O(n): numpy numbers all places only where they are fewer than 50 n.
        taken = generator.choice(self.size, n, replace=False, shuffle=True)
        self.size -= n
        end_is_taken = np.zeros(n, dtype=bool)
        end_is_taken[taken[taken >= self.size] - self.size] = True
        holes = torch.from_numpy(taken[taken < self.size])
        fillers = torch.from_numpy(np.flatnonzero(~end_is_taken) + self.size)
        places = torch.from_numpy(taken)
        batch = {}
        for name, rows in self.rows.items():
            batch[name] = rows.index_select(0, places.to(rows.device))
            rows.index_copy_(
                0, holes.to(rows.device), rows.index_select(0, fillers.to(rows.device))
            )
        return batch
