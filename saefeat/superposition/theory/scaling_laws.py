"""What a loss costs in parameters, tokens and compute (Kaplan et al. 2020, arXiv:2001.08361)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from saefeat.superposition.theory.checks import check_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class PowerLaw:
    """Loss in nats per token from one resource, where nothing else is short.

    L(x) = (x_c / x)^alpha
    """

    critical: float
    """x_c, in the unit of the resource."""
    exponent: float
    """alpha."""

    def __post_init__(self) -> None:
        check_positive("A scaling law", critical=self.critical, exponent=self.exponent)

    def loss(self, amount: float) -> float:
        """L(x)."""
        check_positive("A scaling law", amount=amount)
        return float((self.critical / amount) ** self.exponent)

    def amount(self, loss: float) -> float:
        """The x that gives a loss: x_c / L^(1 / alpha)."""
        check_positive("A scaling law", loss=loss)
        return float(self.critical / loss ** (1 / self.exponent))

    def worth(self, loss_gap: float) -> float:
        """The factor in x that lowers a loss which is `loss_gap` above another to that other.

        Equal losses have to be more equal than they look:

        >>> [round(LOSS_FROM_PARAMETERS.worth(gap), 2) for gap in (0.01, 0.03)]
        [1.14, 1.48]

        Raises:
            ValueError: The gap, a fraction of the loss, is -1 or less.
        """
        if not -1 < loss_gap < math.inf:
            raise ValueError(
                f"A gap is a fraction of the loss, above -1 (0.01 is 1 %); got {loss_gap}."
            )
        return float((1 + loss_gap) ** (1 / self.exponent))


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedLaw:
    """A power law through losses that were measured."""

    law: PowerLaw
    low: float
    """Ends of the 95 % interval of the exponent, by Student's t of the regression:"""
    high: float
    worst: float
    """The largest deviation of a loss from the law, as a share of it."""

    @classmethod
    def of(cls, amounts: Sequence[float], losses: Sequence[float]) -> "FittedLaw":
        """ln L = alpha (ln x_c - ln x) by least squares.

        Args:
            amounts: x of each model, such as its parameters; three different ones at least.
            losses: What each reached, in nats a token; of one amount there may be several.

        Raises:
            ValueError: There are too few amounts, or the losses do not fall with them.
        """
        if len(amounts) != len(losses) or len(set(amounts)) < 3:
            raise ValueError(
                "A power law is fitted to a loss for each amount, of three different amounts at "
                f"least, got {len(losses)} losses of {len(set(amounts))} amounts."
            )
        for amount, loss in zip(amounts, losses, strict=True):
            check_positive("A scaling law", amount=amount, loss=loss)
        x, y = np.log(amounts), np.log(losses)
        fitted = stats.linregress(x, y)
        exponent = -float(fitted.slope)
        if exponent <= 0:
            raise ValueError(
                f"The losses do not fall: the slope of ln L on ln x is {-exponent:.3g}. Were all "
                "models trained alike, and long enough?"
            )
        half = float(stats.t.ppf(0.975, len(x) - 2) * fitted.stderr)
        deviations = np.expm1(y - (fitted.intercept + fitted.slope * x))
        return cls(
            law=PowerLaw(critical=math.exp(fitted.intercept / exponent), exponent=exponent),
            low=exponent - half,
            high=exponent + half,
            worst=float(np.abs(deviations).max()),
        )

    def __str__(self) -> str:
        return (
            f"L = ({self.law.critical:.3g} / x)^{self.law.exponent:.3f}, exponent "
            f"{self.low:.3f} to {self.high:.3f}, off by {self.worst:.1%} at most"
        )


LOSS_FROM_PARAMETERS = PowerLaw(critical=8.8e13, exponent=0.076)
"""L(N), N parameters without embeddings, trained on enough data (Kaplan et al. 2020, eq. 1.1)."""
LOSS_FROM_TOKENS = PowerLaw(critical=5.4e13, exponent=0.095)
"""L(D), D tokens, for large models stopped early (Kaplan et al. 2020, eq. 1.2)."""
LOSS_FROM_COMPUTE = PowerLaw(critical=3.1e8, exponent=0.050)
"""L(C_min), C in PF-days, spent as well as can be (Kaplan et al. 2020, eq. 1.3)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JointLaw:
    """Loss from parameters N and tokens D together (Kaplan et al. 2020, eq. 1.5).

    L(N, D) = [(N_c / N)^(alpha_N / alpha_D) + D_c / D]^alpha_D
    """

    parameters: PowerLaw
    """L(N, infinity)."""
    tokens: PowerLaw
    """L(infinity, D)."""

    def loss(self, n_parameters: float, n_tokens: float) -> float:
        """L(N, D); either may be infinite."""
        return float(
            (self._share(self.parameters, n_parameters) + self._share(self.tokens, n_tokens))
            ** self.tokens.exponent
        )

    def n_parameters(self, loss: float, n_tokens: float) -> float:
        """The N that gives a loss with D tokens.

        Raises:
            ValueError: D tokens are too few for that loss, however large the model.
        """
        return self._missing(loss, self.tokens, n_tokens, self.parameters, "tokens")

    def n_tokens(self, loss: float, n_parameters: float) -> float:
        """The D that gives a loss with N parameters.

        Raises:
            ValueError: N parameters are too few for that loss, however much the data.
        """
        return self._missing(loss, self.parameters, n_parameters, self.tokens, "parameters")

    def _share(self, law: PowerLaw, amount: float) -> float:
        """What one resource adds to L^(1 / alpha_D)."""
        if amount == math.inf:
            return 0.0
        return float(law.loss(amount) ** (1 / self.tokens.exponent))

    def _missing(
        self, loss: float, given: PowerLaw, amount: float, wanted: PowerLaw, name: str
    ) -> float:
        """The amount of `wanted` that the loss still needs beside that of `given`."""
        check_positive("A scaling law", loss=loss)
        rest = loss ** (1 / self.tokens.exponent) - self._share(given, amount)
        if rest <= 0:
            raise ValueError(
                f"A loss of {loss} nats cannot be had with {amount:.3g} {name}, which alone keep "
                f"it above {given.loss(amount):.4g}. Ask for a higher loss or give more {name}."
            )
        return wanted.amount(rest**self.tokens.exponent)


LOSS_FROM_PARAMETERS_AND_TOKENS = JointLaw(
    parameters=PowerLaw(critical=6.4e13, exponent=0.076),
    tokens=PowerLaw(critical=1.8e13, exponent=0.103),
)
"""L(N, D) with the constants of Kaplan et al. 2020, table 2, which are quoted from memory. They
agree with what is not: each limit is within 6 % of its own law above, up to the paper's 2.3e10
tokens, and the data that keeps overfitting below 2 % comes out as 5e3 N^0.74, its eq. 4.4."""
