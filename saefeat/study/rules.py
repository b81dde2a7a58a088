"""What counts as what, fixed before anything is measured."""

from dataclasses import dataclass

from saefeat.superposition.estimators import LEAST_COVERAGE


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """Levels and margins of the verdict. A study records them with its configuration.

    Raises:
        ValueError: A number is out of range.
    """

    level: float = 0.95
    """Of intervals; 1 - alpha of tests."""
    least_coverage: float = LEAST_COVERAGE
    """Of a count that is a number and not a lower bound."""
    least_counted: float = 0.75
    """Share of the layers of a shape that have to be counted: six of the eight that four models of
    two layers have."""
    least_replicates: int = 4
    """Models of each shape."""
    equal_loss: float = 0.005
    """Largest gap of the shapes' mean validation losses, as a share of the smallest, that is said
    to be none."""
    equal_parameters: float = 0.01
    """The same of their numbers of parameters."""
    density_margin: float = 0.32
    """log2 of the ratio of densities of matched features within which they are equal: 1.25 fold."""
    least_universality: float = 0.5
    """U whose interval is above is high, and low where it is below."""
    bound: float = 1.0
    """2 x load beyond which l1 minimisation does not recover features."""
    persistent: float = 0.5
    """Share of the other layers, (pi - 1) / (L - 1), from which features are said to persist."""
    n_resamples: int = 2000
    """Of the percentile bootstrap that is shown beside the interval."""

    def __post_init__(self) -> None:
        shares = ("level", "least_coverage", "least_counted", "least_universality", "persistent")
        for name in shares:
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be above 0 and below 1, got {getattr(self, name)}.")
        for name in ("equal_loss", "equal_parameters", "density_margin", "bound"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")
        if self.least_replicates < 2 or self.n_resamples < 40:
            raise ValueError(
                "An interval needs 2 replicates and 40 resamples at least, got "
                f"{self.least_replicates} and {self.n_resamples}."
            )
