"""From the numbers of a study to what may be claimed, by rules that were fixed before.

Two steps. The slope beta of ln(features per neuron) on ln(width) at equal N picks a theory of how
features lie in layers, if its interval holds that theory's slope and no other's. What else was
measured then says what becomes of the two statements of Katta 2024 (arXiv:2407.01459) that cannot
both hold: that linear superposition is a complete theory of features, and that models of equal
loss learn the same ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from saefeat.study.rules import Rules
from saefeat.superposition.theory import DEGREE_SLOPES
from saefeat.superposition.universality.score import Estimate

STATUSES = ("claimed", "undecided", "withheld", "unmeasurable")
"""A theory is claimed; the interval holds several theories' slopes or none; it holds one's, but a
control does too; or there is no slope."""

CONCLUSIONS = {
    "linear superposition insufficient": "The wide model holds the same features, as often on, at "
    "a load beyond what linear superposition allows: it is no complete theory here.",
    "no contradiction": "Features are partitioned over layers as the note has it, but the wide "
    "model's load is within what linear superposition allows: nothing contradicts at this scale.",
    "partitioned": "Features are partitioned over layers (or have room in proportion to the "
    "square of the width); whether that contradicts linear superposition is open.",
    "universality fails": "Every layer is filled to the same degree, and models of equal loss hold "
    "unequal numbers of features: universality fails.",
    "filled": "Every layer is filled to the same degree, as by a capacity in proportion to its "
    "width; whether the models hold unequal numbers of features is open.",
    "partition premise fails": "Features persist through the layers, so that a wide model has "
    "fewer per neuron: the note's premise that layers divide them fails.",
    "shared": "A wide model has fewer features per neuron, as if every layer held all; whether "
    "they persist through the layers is open.",
    "none of the three": "The slope is none of the three theories'.",
    "undecided": "The interval holds the slopes of several theories: more models are needed.",
    "withheld": "Models that were never trained give the same slope, so that it says nothing "
    "about what was learned.",
    "unmeasurable": "The features could not be counted well enough to say.",
}
"""What each conclusion says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """All that the verdict goes by; None where it was not measured."""

    slope: Estimate | None
    reasons: tuple[str, ...] = ()
    """Why there is no slope."""
    at_least: Mapping[str, float] = field(default_factory=dict)
    """Features per neuron that each shape has at least, where there is no slope."""
    control_slope: Estimate | None = None
    """That of random models."""
    narrow_twice_load: Estimate | None = None
    wide_twice_load: Estimate | None = None
    """2 x load of the shapes A and B, mean over layers."""
    densities_equal: bool | None = None
    universality: Estimate | None = None
    """U, against the null that leaves least of it."""
    feature_ratio: Estimate | None = None
    """Features of the whole model, each counted once, of B over A."""
    persistence: Mapping[str, float] = field(default_factory=dict)
    """(pi - 1) / (L - 1) of A and B: 0 where each latent lies in one layer, 1 where all do in all
    layers."""
    caveats: tuple[str, ...] = ()
    """What else a reader has to know."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What may be claimed of one site by one instrument. `print` it."""

    status: str
    """One of `STATUSES`."""
    theory: str | None
    """The theory whose slope the interval holds and no other's, also where that is withheld."""
    conclusion: str
    """A key of `CONCLUSIONS`."""
    predicted: dict[str, float]
    """beta by each theory."""
    measured: Estimate | None
    """beta, with its interval."""
    sentence: str
    """What follows, in words."""
    reasons: tuple[str, ...]
    """Why, or why not more."""
    caveats: tuple[str, ...]

    def __str__(self) -> str:
        beta = "not measurable" if self.measured is None else f"{self.measured}"
        slopes = ", ".join(f"{name} {slope:+.0f}" for name, slope in self.predicted.items())
        lines = [
            f"{self.conclusion.upper()}: {self.sentence}",
            f"  slope of ln psi on ln d: {beta}; predicted: {slopes}",
        ]
        lines += [f"  {reason}" for reason in self.reasons]
        lines += [f"  Note: {caveat}" for caveat in self.caveats]
        return "\n".join(lines)


def judge(evidence: Evidence, rules: Rules) -> Verdict:
    """The verdict by the rules; a pure function of the two."""
    if evidence.slope is None:
        floor = "; ".join(
            f"{label} holds at least {value:.3g} features per neuron"
            for label, value in evidence.at_least.items()
        )
        reasons = (*evidence.reasons, *([floor + "."] if floor else []))
        return _verdict("unmeasurable", None, "unmeasurable", evidence, reasons)
    held = theories_within(evidence.slope)
    if len(held) != 1:
        conclusion = "undecided" if held else "none of the three"
        why = f"The interval holds the slopes of: {', '.join(held) or 'no theory'}."
        return _verdict("undecided", None, conclusion, evidence, (why,))
    theory = held[0]
    control = evidence.control_slope
    if control is not None and theory in theories_within(control):
        why = f"Random models have a slope of {control}, which holds that of {theory} too."
        return _verdict("withheld", theory, "withheld", evidence, (why,))
    conclusion, because = _CASES[theory](evidence, rules)
    return _verdict("claimed", theory, conclusion, evidence, tuple(because))


def theories_within(slope: Estimate) -> list[str]:
    """The theories whose slope an interval holds."""
    return [name for name, beta in DEGREE_SLOPES.items() if slope.low <= beta <= slope.high]


def _verdict(
    status: str,
    theory: str | None,
    conclusion: str,
    evidence: Evidence,
    reasons: tuple[str, ...],
) -> Verdict:
    return Verdict(
        status=status,
        theory=theory,
        conclusion=conclusion,
        predicted={name: float(beta) for name, beta in DEGREE_SLOPES.items()},
        measured=evidence.slope,
        sentence=CONCLUSIONS[conclusion],
        reasons=reasons,
        caveats=evidence.caveats,
    )


def _partitioned(evidence: Evidence, rules: Rules) -> tuple[str, list[str]]:
    load, u = evidence.wide_twice_load, evidence.universality
    if load is None:
        return "partitioned", ["The load was not measured."]
    if load.high < rules.bound:
        return "no contradiction", [f"2 x load of the wide model is {load}, below {rules.bound:g}."]
    if load.low <= rules.bound:
        return "partitioned", [
            f"2 x load of the wide model is {load}, on both sides of {rules.bound:g}."
        ]
    reasons = [f"2 x load of the wide model is {load}, above {rules.bound:g}."]
    if evidence.densities_equal is None:
        reasons.append("Densities of matched features were not measured.")
    elif not evidence.densities_equal:
        reasons.append("Densities of matched features were not shown to be equal.")
    if u is None:
        reasons.append("Universality was not measured.")
    elif u.low <= rules.least_universality:
        reasons.append(f"Universality is {u}, not above {rules.least_universality:g}.")
    if len(reasons) > 1:
        return "partitioned", reasons
    return "linear superposition insufficient", [
        *reasons,
        f"Densities of matched features are equal, and universality is {u}.",
    ]


def _filled(evidence: Evidence, rules: Rules) -> tuple[str, list[str]]:
    features = evidence.feature_ratio
    if features is None:
        return "filled", ["Features of whole models, each counted once, were not measured."]
    said = f"The wide model holds {features} times as many features as the narrow one"
    if features.low <= 1 <= features.high:
        return "filled", [f"{said}: not shown to be unequal."]
    return "universality fails", [f"{said}."]


def _shared(evidence: Evidence, rules: Rules) -> tuple[str, list[str]]:
    if not evidence.persistence:
        return "shared", ["How many layers hold a feature was not measured."]
    shares = ", ".join(f"{value:.2f} in {label}" for label, value in evidence.persistence.items())
    said = f"Of the other layers, the share that holds a latent is {shares}"
    if min(evidence.persistence.values()) >= rules.persistent:
        return "partition premise fails", [f"{said}."]
    return "shared", [f"{said}: below {rules.persistent:g}."]


_CASES = {"partitioned": _partitioned, "filled": _filled, "shared": _shared}
