"""How the device programs behind `saefeat.kernels.triton` are made.

One program serves one row, or a few entries. Arguments are pointers, numbers, and what the
program is compiled for (`tl.constexpr`): `block` columns at a time, `many` entries at a time,
`wide` the type sums are held in. A row's number is made int64 before it is multiplied, because
rows x width passes 2**31 in ordinary runs.
"""

import inspect
from typing import Any

import triton


def compiled(function: Any) -> Any:
    """The function as a Triton program, compiled for each type of argument when first run."""
    # Tests wrap each function to check shapes; what Triton reads is the plain one inside.
    return triton.jit(inspect.unwrap(function))
