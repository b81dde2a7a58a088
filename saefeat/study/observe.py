"""One model of the study: its activations read once, then every layer counted.

Each layer, and each thing that is measured of all layers, is one JSON file in the model's folder,
which is written once it is known: a study that was killed goes on with the next one.
"""

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from saefeat.activations.store import cache_activations
from saefeat.activations.stream import ActivationStream
from saefeat.activations.tokens import Tokens
from saefeat.core.files import read_json, write_json
from saefeat.dictionaries.crosscoder import AcrossHooks, CrosscoderConfig
from saefeat.metrics.layers import layer_profile
from saefeat.metrics.loss_recovered import CrossEntropy
from saefeat.models.load import load_model
from saefeat.study.observations import (
    JointObservation,
    LayerObservation,
    ModelObservation,
)
from saefeat.study.protocol import HOOKS, Protocol
from saefeat.superposition.counting import count_features
from saefeat.superposition.joint_features import JointFeatures
from saefeat.superposition.sae_counts import count_recipe, sae_counts
from saefeat.training.trainer import train

BATCH_ROWS = 512
"""Rows of a step; see `count_recipe`."""
LOSS_CONTEXTS = 512
"""Held-out contexts that the loss of a model is the mean of."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model of the study."""

    shape_label: str
    model_seed: int
    control: str
    """"trained" or "random"."""
    source: Any
    """What `load_model` takes."""
    n_layers: int
    n_parameters: int
    """Weights of its blocks, without biases and norms."""
    n_bytes: int
    """Of text that it was trained on; 0 if that is not known, or for a random one."""
    validation_loss: float | None = None
    """On text that it was not trained on; None if that has to be measured."""
    fingerprint: str | None = None
    """Of the weights of a model of one's own; those of the zoo follow from the protocol."""

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.shape_label}-{self.control}-{self.model_seed}"

    @property
    def is_portable(self) -> bool:
        """Whether another process can be told of it."""
        return isinstance(self.source, str | Path)

    def model(self) -> Any:
        """The model itself, in float32: bfloat16 would round what is counted."""
        if self.is_portable:
            return load_model(self.source, dtype="float32", device="cpu")
        return self.source


def parts(subject: Subject, protocol: Protocol) -> list[str]:
    """The names of the files that a finished model has."""
    layers = protocol.layers(subject.n_layers)
    names = [f"layer-{site}-{layer}" for site in protocol.sites for layer in layers]
    names += [f"joint-{site}" for site in protocol.crosscoder_sites if site in protocol.sites]
    return ["model", *names]


def observe(subject: Subject, tokens: Tokens, protocol: Protocol, folder: Path) -> None:
    """Measure what is not in `folder` yet.

    Args:
        subject: The model.
        tokens: The text, the same for all models.
        protocol: How.
        folder: Of this model. The activations are there too while they are needed.
    """
    missing = [name for name in parts(subject, protocol) if not _file(folder, name).exists()]
    store = folder / "activations"
    if not missing:
        # Of a call that was killed once it had written all that it was for.
        shutil.rmtree(store, ignore_errors=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    model = subject.model()
    if "model" in missing:
        loss = subject.validation_loss
        if loss is None:
            loss = CrossEntropy(model, tokens.held_out.first(LOSS_CONTEXTS)).clean()
        _write(folder, "model", [_model_observation(subject, loss)])
    hooks = {
        site: [HOOKS[site].format(layer) for layer in range(subject.n_layers)]
        for site in protocol.sites
    }
    cache_activations(
        ActivationStream.from_model(
            model, tokens, [hook for site in hooks.values() for hook in site], batch_size=BATCH_ROWS
        ),
        store,
        protocol.n_tokens,
        held_out_tokens=protocol.held_out_tokens,
        resume=store.exists(),
        progress=False,
    )
    for site in protocol.sites:
        for layer in protocol.layers(subject.n_layers):
            name = f"layer-{site}-{layer}"
            if name in missing:
                found = observe_layer(subject, store, site, layer, protocol, folder)
                _write(folder, name, [asdict(one) for one in found])
        name = f"joint-{site}"
        if name in missing:
            reuse = _reuse(store, hooks[site], site, protocol, folder)
            joint = JointObservation(
                shape_label=subject.shape_label,
                model_seed=subject.model_seed,
                control=subject.control,
                site=site,
                reuse=reuse,
            )
            _write(folder, name, [asdict(joint)])
    shutil.rmtree(store)


def observe_layer(
    subject: Subject, store: Path, site: str, layer: int, protocol: Protocol, folder: Path
) -> list[LayerObservation]:
    """Count one layer by matching pursuit, by SAEs, and by SAEs with a frozen decoder.

    The SAEs have `sae_width` times as many latents as the count has found features, or as there
    are neurons, so that nothing about them is chosen by shape. The first is kept in `folder`.
    """
    hook_name = HOOKS[site].format(layer)
    stream = ActivationStream.from_store(store, hook_name, batch_size=BATCH_ROWS)
    count = count_features(
        stream,
        n_tokens=protocol.n_tokens,
        seeds=protocol.count_seeds,
        picks=protocol.picks,
        expansion_factors=protocol.expansion_factors,
        saes=False,
        device="cpu",
        progress=False,
    )
    who: dict[str, Any] = {
        "shape_label": subject.shape_label,
        "model_seed": subject.model_seed,
        "control": subject.control,
        "site": site,
        "layer": layer,
    }
    observed = [LayerObservation.of_count(count, **who)]
    width = count.n_neurons
    factor = math.ceil(protocol.sae_width * max(count.estimate, width)) / width
    for instrument, is_frozen in (("batch_topk", False), ("frozen_decoder", True)):
        bank = train(
            stream,
            count_recipe(protocol.sae_k, freeze_decoder=is_frozen),
            expansion_factors=[factor],
            seeds=protocol.sae_seeds,
            n_tokens=protocol.n_tokens,
            device="cpu",
            progress=False,
        )
        (counts,) = sae_counts(bank, stream, n_tokens=protocol.held_out_tokens, progress=False)
        observed.append(
            LayerObservation.of_sae_counts(
                counts, n_tokens=protocol.n_tokens, instrument=instrument, **who
            )
        )
        if not is_frozen:
            place = folder / "saes" / f"{site}-{layer}"
            # Of a call that was killed before it could write what it had found.
            shutil.rmtree(place, ignore_errors=True)
            next(iter(bank.values())).save(place)
    return observed


def _reuse(
    store: Path, hooks: Sequence[str], site: str, protocol: Protocol, folder: Path
) -> float | None:
    """pi: how many layers hold a latent of a crosscoder of all layers, on average.

    Features that layers divide among them are as many together, and as many of them on, as the
    layers have in all; those that persist as many as one layer has. So that neither is built in,
    latents and k are the geometric mean of the two.
    """
    if len(hooks) < 2:
        return None
    held = [
        max(one["estimate"], one["n_neurons"])
        for path in sorted(folder.glob(f"layer-{site}-*.json"))
        for one in read_json(path)
        if one["instrument"] == "matching_pursuit"
    ]
    in_all = sum(held) * len(hooks) / len(held)
    n_latents = protocol.sae_width * math.sqrt(max(held) * in_all)
    k = max(1, round(protocol.sae_k * math.sqrt(len(hooks))))
    stream = ActivationStream.from_store(store, list(hooks), batch_size=BATCH_ROWS)
    width = stream.widths[hooks[0]]
    bank = train(
        stream,
        CrosscoderConfig(k=k, learning_rate=2e-3),
        groups={"all": list(hooks)},
        expansion_factors=[max(2 * k, math.ceil(n_latents)) / width],
        seeds=protocol.sae_seeds[:1],
        n_tokens=protocol.n_tokens,
        device="cpu",
        progress=False,
    )
    (crosscoder,) = bank.values()
    assert isinstance(crosscoder, AcrossHooks)
    features = JointFeatures(crosscoder)
    for batch in stream.held_out_batches(protocol.held_out_tokens):
        x = torch.cat([batch[hook].float() for hook in hooks], dim=1)
        codes = crosscoder.encode(x)
        features.update(codes, x, crosscoder.decode(codes))
    counted = features.counted
    return layer_profile(crosscoder, counted).reuse if counted.any() else None


def _model_observation(subject: Subject, loss: float) -> dict[str, Any]:
    return asdict(
        ModelObservation(
            shape_label=subject.shape_label,
            model_seed=subject.model_seed,
            control=subject.control,
            validation_loss=loss,
            n_bytes=subject.n_bytes,
        )
    )


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def _write(folder: Path, name: str, records: list[dict[str, Any]]) -> None:
    write_json(_file(folder, name), records)
