"""How many features per neuron, at which layer, how sure: in words."""

from saefeat.report.record import Layer, Report

COUNT_IT = (
    "To count features: saefeat measure RUN --counts 300000, or in Python "
    "sf.measure(bank, stream, counts=[sf.count_features(stream, n_tokens=300_000)])."
)


def certainty(layer: Layer) -> str:
    """How far the number of a layer can be relied on."""
    if layer.coverage is None:
        return "not a count"
    return "counted" if layer.identifiable else "lower bound"


def per_neuron(layer: Layer) -> str:
    """Features per neuron with their interval."""
    low, high = layer.n_features["low"], layer.n_features["high"]
    if high is None:
        return f"at least {low / layer.n_neurons:.2f}"
    interval = f"{low / layer.n_neurons:.2f} to {high / layer.n_neurons:.2f}"
    return f"{layer.features_per_neuron:.2f} ({interval})"


def conclusions(report: Report) -> list[str]:
    """A sentence or two for each kind of answer that layers have."""
    by_kind: dict[str, list[Layer]] = {}
    for layer in report.layers:
        by_kind.setdefault(certainty(layer), []).append(layer)
    sentences = []
    if counted := by_kind.get("counted"):
        most = max(counted, key=lambda layer: layer.features_per_neuron)
        least = min(counted, key=lambda layer: layer.features_per_neuron)
        sentence = f"{most.hook_name} holds {per_neuron(most)} features per neuron"
        if most is not least:
            sentence += f", the most; {least.hook_name} holds {per_neuron(least)}, the fewest"
        sentences.append(f"{sentence}. {_layers(len(counted))} counted.")
    if bounded := by_kind.get("lower bound"):
        most = max(bounded, key=lambda layer: layer.features_per_neuron)
        sentences.append(
            f"{_layers(len(bounded))} known to a lower bound only, the highest at "
            f"{most.hook_name}, {per_neuron(most)} features per neuron."
            + ("" if all(layer.width_curve for layer in bounded) else f" {COUNT_IT}")
        )
    if uncounted := by_kind.get("not a count"):
        alive = [layer.features_per_neuron for layer in uncounted]
        span = f"{min(alive):.2f}" + (f" to {max(alive):.2f}" if len(alive) > 1 else "")
        sentences.append(
            f"{_layers(len(uncounted))} not counted. {span} latents per neuron are alive, which "
            f"says how wide the dictionaries are, not how many features there are. {COUNT_IT}"
        )
    return sentences


def _layers(n: int) -> str:
    return "1 layer is" if n == 1 else f"{n} layers are"
