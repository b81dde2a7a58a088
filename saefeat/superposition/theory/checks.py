"""What the numbers of the theory have to be."""

import math


def check_positive(what: str, **numbers: float) -> None:
    """ValueError unless each of the named numbers is finite and above 0."""
    for name, number in numbers.items():
        if not 0 < number < math.inf:
            raise ValueError(f"{what} needs a finite {name} above 0, got {number}.")
