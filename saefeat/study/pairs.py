"""Two models of different shapes: do their SAEs find the same features, as often on?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from saefeat.activations.stream import ActivationStream
from saefeat.activations.tokens import Tokens
from saefeat.dictionaries.base import Dictionary
from saefeat.dictionaries.loading import load_dictionary
from saefeat.metrics.sparsity import SparsityCounts
from saefeat.study.observations import PairObservation
from saefeat.study.observe import Subject
from saefeat.study.protocol import HOOKS, Protocol
from saefeat.superposition.universality.measure import Reader, universality


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A narrow and a wide model at one depth, and what their likeness is measured against."""

    narrow: Subject
    wide: Subject
    again: Subject
    """Another model of the narrow shape."""
    random: Subject | None
    """One that was never trained."""
    site: str
    layers: tuple[int, int]
    """Of the narrow and of the wide model."""

    @property
    def name(self) -> str:
        """Of its file."""
        narrow, wide = self.layers
        return f"{self.site}-{self.narrow.name}-{narrow}-{self.wide.name}-{wide}"


def pairs(subjects: Sequence[Subject], protocol: Protocol) -> Iterator[Pair]:
    """Each narrow model with a wide one of its own, in the middle and at the end of both."""
    narrow_label, wide_label = protocol.pair

    def models(label: str, control: str) -> list[Subject]:
        return [one for one in subjects if (one.shape_label, one.control) == (label, control)]

    narrow, wide = models(narrow_label, "trained"), models(wide_label, "trained")
    random = models(narrow_label, "random")
    for i, (one, other) in enumerate(zip(narrow, wide, strict=False)):
        depths = [protocol.layers(subject.n_layers) for subject in (one, other)]
        n_depths = min(2, *(len(layers) for layers in depths))
        for site in protocol.sites:
            for half in range(n_depths):
                layers = [own[(half + 1) * len(own) // n_depths - 1] for own in depths]
                yield Pair(
                    narrow=one,
                    wide=other,
                    again=narrow[(i + 1) % len(narrow)],
                    random=random[0] if random else None,
                    site=site,
                    layers=(layers[0], layers[1]),
                )


def observe_pair(pair: Pair, tokens: Tokens, protocol: Protocol, models: Path) -> PairObservation:
    """Correlate the latents of SAEs of both models on the same held-out tokens.

    Args:
        pair: Which.
        tokens: The text that all models were counted on.
        protocol: How.
        models: The folder with those of the models, where the SAEs are.
    """

    def reader(subject: Subject, layer: int) -> Reader:
        sae = load_dictionary(models / subject.name / "saes" / f"{pair.site}-{layer}")
        hook_name = HOOKS[pair.site].format(layer)
        return sae, ActivationStream.from_model(subject.model(), tokens, hook_name)

    narrow_layer, wide_layer = pair.layers
    narrow, wide = reader(pair.narrow, narrow_layer), reader(pair.wide, wide_layer)
    result = universality(
        narrow,
        wide,
        again=reader(pair.again, narrow_layer),
        random=None if pair.random is None else reader(pair.random, narrow_layer),
        n_tokens=protocol.held_out_tokens,
        progress=False,
    )
    return PairObservation.of_universality(
        result,
        _densities(*narrow, protocol),
        _densities(*wide, protocol),
        narrow=(pair.narrow.shape_label, pair.narrow.model_seed),
        wide=(pair.wide.shape_label, pair.wide.model_seed),
        site=pair.site,
        instrument="batch_topk",
    )


@torch.no_grad()
def _densities(
    sae: Dictionary, stream: ActivationStream, protocol: Protocol
) -> Float[Tensor, " d_sae"]:
    """How often each latent is on, in the rows that latents are correlated on."""
    counts = SparsityCounts(sae.decoder_norms)
    for batch in stream.held_out_batches(protocol.held_out_tokens):
        counts.update(sae.encode(batch[sae.hook_name].float()))
    return counts.density
