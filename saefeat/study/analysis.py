"""`findings`: all numbers of a study, each beside what the theories predict, and the verdict."""

from collections.abc import Sequence

import numpy as np

from saefeat.study.finding import Finding, Findings
from saefeat.study.observations import (
    JointObservation,
    Observations,
    ObservedShape,
    PairObservation,
)
from saefeat.study.replicates import ShapeCounts, shape_counts
from saefeat.study.rules import Rules
from saefeat.study.statistics import (
    Equivalence,
    cluster_bootstrap,
    equivalence,
    lack_of_fit,
    mean,
    permutation_test,
    slope,
    slope_weights,
)
from saefeat.study.table import comparison
from saefeat.study.verdict import Evidence, judge
from saefeat.superposition.theory import LOSS_FROM_PARAMETERS
from saefeat.superposition.universality.score import Estimate

_MATCHED_BY_SAES = "U and the densities of matched features are those of BatchTopK SAEs."


def findings(observations: Observations, rules: Rules | None = None) -> Findings:
    """All that follows from the observations, by the rules.

    Raises:
        ValueError: No layer was observed, or one model is in two pairs.
    """
    rules = rules or Rules()
    if not observations.layers:
        raise ValueError("Nothing follows from no observations: no layer was counted.")
    kinds = dict.fromkeys((one.site, one.instrument) for one in observations.layers)
    losses, gap = _losses(observations, rules)
    general = _general_caveats(observations, rules, gap)
    return Findings(
        parts=tuple(
            _finding(observations, site, instrument, rules, general) for site, instrument in kinds
        ),
        losses=losses,
        loss_gap=gap,
        rules=rules,
    )


def _finding(
    observations: Observations,
    site: str,
    instrument: str,
    rules: Rules,
    general: Sequence[str],
) -> Finding:
    trained = _counts(observations, site, instrument, "trained", rules)
    random = _counts(observations, site, instrument, "random", rules)
    narrow, wide = (observations.shape(label) for label in observations.pair)
    a, b = (_of(trained, shape, rules) for shape in (narrow, wide))
    beta, bootstrap, fit = _slopes(trained, observations, rules)
    control, _, _ = _slopes(random, observations, rules)
    pairs, matched_by = _pairs(observations, site, instrument)
    densities = _densities(pairs, rules)
    null, u = _universality(pairs, rules)
    joint = [one for one in observations.joint if one.site == site and one.control == "trained"]
    held = {one.label: _numbers(joint, one.label, "reuse") for one in (narrow, wide)}
    reuse = {k: mean(values, rules.level) for k, values in held.items() if len(values) >= 2}
    features = [_whole_features(shape, joint, counts) for shape, counts in ((narrow, a), (wide, b))]
    table = comparison(narrow, wide, a, b, features, densities, u, list(held.values()), rules)
    loads = [_twice_load(counts, rules) for counts in (a, b)]
    feature_row = next(row for row in table if row.name == "features, each counted once")
    evidence = Evidence(
        slope=beta,
        reasons=tuple(reason for counts in trained for reason in counts.reasons),
        at_least={counts.shape_label: counts.at_least for counts in trained},
        control_slope=control,
        narrow_twice_load=loads[0],
        wide_twice_load=loads[1],
        densities_equal=None if densities is None else densities.is_equivalent,
        universality=u,
        feature_ratio=feature_row.measured,
        persistence={
            shape.label: (reuse[shape.label].value - 1) / (shape.n_layers - 1)
            for shape in (narrow, wide)
            if shape.label in reuse and shape.n_layers > 1
        },
        caveats=(
            *general,
            *_caveats(trained, random, control, fit, loads[0], rules),
            *(() if matched_by == instrument else (_MATCHED_BY_SAES,)),
        ),
    )
    return Finding(
        site=site,
        instrument=instrument,
        replicates=tuple(one for counts in trained for one in counts.replicates),
        controls=tuple(one for counts in random for one in counts.replicates),
        counted={one.shape_label: (one.n_counted, one.n_layers) for one in trained},
        slope=beta,
        bootstrap=bootstrap,
        lack_of_fit=fit,
        control_slope=control,
        permutation=permutation_test(_log_degree(a), _log_degree(b))
        if a.replicates and b.replicates
        else None,
        table=table,
        density_equivalence=densities,
        universality=u,
        universality_null=null,
        reuse=reuse,
        saturated=_above(loads[0], rules.bound / 2),
        verdict=judge(evidence, rules),
    )


def _counts(
    observations: Observations, site: str, instrument: str, control: str, rules: Rules
) -> list[ShapeCounts]:
    """The replicates of each shape; none at all where no model of this kind was looked at."""
    own = [
        one
        for one in observations.layers
        if (one.site, one.instrument, one.control) == (site, instrument, control)
    ]
    if not own:
        return []
    return [shape_counts(shape.label, own, rules) for shape in observations.shapes]


def _pairs(
    observations: Observations, site: str, instrument: str
) -> tuple[list[PairObservation], str]:
    """Pairs of the narrow and the wide shape at a site, and what their features are by.

    Pursuit counts directions and keeps no latents to correlate: whether two models hold the same
    features is told by SAEs of the same layers.
    """
    for by in (instrument, *(("batch_topk",) if instrument == "matching_pursuit" else ())):
        found = [
            one
            for one in observations.pairs
            if (one.site, one.instrument) == (site, by)
            and (one.narrow_label, one.wide_label) == observations.pair
        ]
        if found:
            return found, by
    return [], instrument


def _of(counts: Sequence[ShapeCounts], shape: ObservedShape, rules: Rules) -> ShapeCounts:
    for one in counts:
        if one.shape_label == shape.label:
            return one
    return shape_counts(shape.label, [], rules)


def _log_degree(counts: ShapeCounts) -> np.ndarray:
    logs: np.ndarray = np.log(counts.values(lambda one: one.features_per_neuron))
    return logs


def _slopes(
    counts: Sequence[ShapeCounts], observations: Observations, rules: Rules
) -> tuple[Estimate | None, Estimate | None, float | None]:
    """beta, the same with the percentile bootstrap, and p of lack of fit."""
    if not counts or any(one.reasons for one in counts):
        return None, None, None
    x = np.log([observations.shape(one.shape_label).d_model for one in counts])
    groups = [_log_degree(one) for one in counts]
    sds = np.array([one.count_sd for one in counts])
    return (
        slope(x, groups, count_sds=sds, level=rules.level),
        cluster_bootstrap(
            groups, slope_weights(x), n_resamples=rules.n_resamples, level=rules.level
        ),
        lack_of_fit(x, groups, count_sds=sds),
    )


def _numbers(joint: Sequence[JointObservation], label: str, name: str) -> np.ndarray:
    values = [getattr(one, name) for one in joint if one.shape_label == label]
    return np.array([value for value in values if value is not None], dtype=np.float64)


def _whole_features(
    shape: ObservedShape, joint: Sequence[JointObservation], counts: ShapeCounts
) -> np.ndarray | None:
    """Features of each whole model, each counted once.

    By a joint count of all layers; otherwise the sum over layers divided by the layers that hold
    each feature, sum_l n_l / pi.
    """
    counted = _numbers(joint, shape.label, "n_features")
    if len(counted) >= 2:
        return counted
    reuse = {one.model_seed: one.reuse for one in joint if one.shape_label == shape.label}
    found = [
        one.features_per_layer * shape.n_layers / pi
        for one in counts.replicates
        if (pi := reuse.get(one.model_seed)) is not None
    ]
    return np.array(found) if len(found) >= 2 else None


def _twice_load(counts: ShapeCounts, rules: Rules) -> Estimate | None:
    if not counts.replicates:
        return None
    return mean(2 * counts.values(lambda one: one.load), rules.level)


def _above(one: Estimate | None, bound: float) -> bool | None:
    if one is None or one.low <= bound <= one.high:
        return None
    return one.low > bound


def _by_models(pairs: Sequence[PairObservation]) -> list[list[PairObservation]]:
    """Pairs of layers gathered by the two models that they are of.

    Raises:
        ValueError: A model is compared with two others, so that the pairs are not independent.
    """
    models: dict[tuple[int, int], list[PairObservation]] = {}
    for one in pairs:
        models.setdefault((one.narrow_seed, one.wide_seed), []).append(one)
    for side in (0, 1):
        seeds = [seed[side] for seed in models]
        if len(set(seeds)) < len(seeds):
            raise ValueError(
                f"Pairs of models have no model in common, got the pairs {sorted(models)}. "
                "Compare each narrow model with one wide model of its own."
            )
    return list(models.values())


def _densities(pairs: Sequence[PairObservation], rules: Rules) -> Equivalence | None:
    means, errors = [], []
    for same in _by_models(pairs):
        known = [
            (one.log2_density_ratio, one.standard_error)
            for one in same
            if one.log2_density_ratio is not None and one.standard_error is not None
        ]
        if known:
            means.append(sum(value for value, _ in known) / len(known))
            errors.append(sum(error**2 for _, error in known) ** 0.5 / len(known))
    if not means:
        return None
    # One pair of models has the spread of its features alone.
    error = errors[0] if len(means) == 1 else None
    return equivalence(
        np.array(means), rules.density_margin, standard_error=error, level=rules.level
    )


def _universality(
    pairs: Sequence[PairObservation], rules: Rules
) -> tuple[str | None, Estimate | None]:
    """The null that leaves least of U, and U against it."""
    gathered = _by_models(pairs)
    nulls = dict.fromkeys(score.null_name for one in pairs for score in one.scores)
    found: list[tuple[float, str, Estimate]] = []
    for null in nulls:
        scores = [
            [s.u for one in same for s in one.scores if s.null_name == null and s.u is not None]
            for same in gathered
        ]
        if not scores or not all(scores):
            continue
        if len(scores) == 1 and len(scores[0]) == 1:
            u = scores[0][0]
        elif len(scores) > 1:
            u = mean(np.array([np.mean([one.value for one in own]) for own in scores]), rules.level)
        else:
            continue
        found.append((u.value, null, u))
    if not found:
        return None, None
    _, null, u = min(found, key=lambda one: one[0])
    return null, u


def _losses(observations: Observations, rules: Rules) -> tuple[dict[str, Estimate], float | None]:
    values = {
        shape.label: np.array(
            [
                one.validation_loss
                for one in observations.models
                if one.control == "trained" and one.shape_label == shape.label
            ]
        )
        for shape in observations.shapes
    }
    known = [one.mean() for one in values.values() if len(one)]
    gap = float(max(known) / min(known) - 1) if len(known) == len(values) else None
    return {k: mean(v, rules.level) for k, v in values.items() if len(v) >= 2}, gap


def _general_caveats(observations: Observations, rules: Rules, gap: float | None) -> list[str]:
    caveats = []
    sizes = [shape.n_parameters for shape in observations.shapes]
    if max(sizes) > (1 + rules.equal_parameters) * min(sizes):
        caveats.append(f"Numbers of parameters are unequal: {min(sizes):,} to {max(sizes):,}.")
    if gap is None:
        caveats.append("Validation losses of all shapes were not measured.")
    elif gap > rules.equal_loss:
        caveats.append(
            f"Losses are unequal by {gap:.2%} ({rules.equal_loss:.1%} is allowed), which is worth "
            f"{LOSS_FROM_PARAMETERS.worth(gap):.2f} times the parameters (Kaplan et al. 2020)."
        )
    return caveats


def _caveats(
    trained: Sequence[ShapeCounts],
    random: Sequence[ShapeCounts],
    control: Estimate | None,
    fit: float | None,
    narrow_twice_load: Estimate | None,
    rules: Rules,
) -> list[str]:
    caveats = []
    n_filled = sum(one.n_filled for counts in trained for one in counts.replicates)
    if n_filled:
        caveats.append(
            f"{n_filled} layers could not be counted, and were given what the same layer of other "
            "models holds."
        )
    if not random:
        caveats.append("No random models were looked at.")
    elif control is None:
        why = next(reason for counts in random for reason in counts.reasons)
        caveats.append(f"Random models have no slope: {why}")
    if fit is not None and fit < 1 - rules.level:
        caveats.append(f"The shapes do not lie on a line (p = {fit:.2g}).")
    if narrow_twice_load is not None and _above(narrow_twice_load, rules.bound / 2) is not True:
        caveats.append(
            f"2 x load of the narrow model is {narrow_twice_load}, not above "
            f"{rules.bound / 2:g}: to double it need not pass the bound."
        )
    return caveats
