"""The answer of `universality`.

Shape letters: m pairs of latents.
"""

from dataclasses import dataclass, field

from jaxtyping import Float, Int
from torch import Tensor

from saefeat.superposition.universality.correlation import ABOVE
from saefeat.superposition.universality.geometry import Similarity
from saefeat.superposition.universality.score import Score


@dataclass(frozen=True, kw_only=True, slots=True)
class MaxCosines:
    """Mean max cosine similarity of decoder rows, beside its nulls; see `geometry.mmcs`."""

    a_in_b: float
    """Over the counted latents of A, of the largest cosine with one of B."""
    b_in_a: float
    null: tuple[float, float]
    """What unrelated directions give, both ways."""
    null_like: tuple[float, float]
    """What unrelated directions with the covariance of these give."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Universality:
    """How far two dictionaries have the same features. `print` it."""

    names: tuple[str, str]
    """The hooks that A and B read."""
    n_tokens: int
    """Rows, the same for all dictionaries."""
    n_contexts: int
    d_sae: tuple[int, int]
    n_counted: tuple[int, int]
    """Latents that were on in `least_firing` rows at least, and vary."""
    least_firing: int
    least_correlation: float
    """Pairs below this were not made, and count as 0."""
    rows: Int[Tensor, " m"] = field(repr=False)
    """The latent of A of each pair of the one-to-one assignment."""
    columns: Int[Tensor, " m"] = field(repr=False)
    """And that of B."""
    correlations: Float[Tensor, " m"] = field(repr=False)
    """Their correlation."""
    assignment_loss: float
    """By how much the sum of correlations may be below the largest possible; 0 where exact."""
    share_above_half: float
    """Share of the pairs that could be made with a correlation above 0.5."""
    mppc: tuple[float, float]
    """Mean max correlation: of A with any of B, and of B with any of A."""
    scores: tuple[Score, ...]
    """U against each null: "shifted", "random model" and "token identity"."""
    cosines: MaxCosines | None
    """None where the dictionaries are of two widths of activations."""
    svcca: Similarity | None
    """Of the decoder rows of the pairs; None where fewer than 3 were made."""
    rsa: Similarity | None

    def __str__(self) -> str:
        first = self.scores[0]
        n_possible = min(self.n_counted)
        loss = f", at most {self.assignment_loss:.3g} below" if self.assignment_loss else ", exact"
        lines = [
            f"{self.names[0]} and {self.names[1]}: {self.n_tokens:,} tokens in "
            f"{self.n_contexts:,} contexts",
            f"  latents counted   {self.n_counted[0]:,} of {self.d_sae[0]:,} and "
            f"{self.n_counted[1]:,} of {self.d_sae[1]:,} (on in {self.least_firing} rows at least)",
            f"  one to one        mean r {first.matched} of {n_possible:,}, "
            f"{self.share_above_half:.1%} above {ABOVE}; {len(self.rows):,} pairs of "
            f"r >= {self.least_correlation}{loss}",
            f"  mean max r        {self.mppc[0]:.3f} and {self.mppc[1]:.3f}",
        ]
        for one in self.scores:
            u = "U undefined" if one.again is not None else "no U without another seed"
            if one.u is not None:
                u = f"U {one.u}"
            again = "" if one.again is None else f", another seed {one.again.value:.3f}"
            lines.append(
                f"  {one.null_name:<17} {u}: r {one.matched.value:.3f}, "
                f"null {one.null.value:.3f}{again}"
            )
        if self.cosines is not None:
            cosines = self.cosines
            lines.append(
                f"  mean max cosine   {cosines.a_in_b:.3f} and {cosines.b_in_a:.3f}, null "
                f"{cosines.null[0]:.3f} and {cosines.null[1]:.3f}, with their covariance "
                f"{cosines.null_like[0]:.3f} and {cosines.null_like[1]:.3f}"
            )
        for name, value in (("SVCCA", self.svcca), ("RSA", self.rsa)):
            if value is not None:
                lines.append(
                    f"  {name:<17} {value.value:.3f}, null {value.null:.3f} "
                    f"(p {value.p_value:.2g}, {value.n_pairs:,} pairs)"
                )
        return "\n".join(lines)
