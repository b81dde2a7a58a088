"""Which models a study measures: those of the zoo, or models of one's own."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from saefeat.activations.sources import fingerprint
from saefeat.models.load import load_model
from saefeat.models.size import n_block_weights
from saefeat.models.zoo import Family, Shape, write_random_model
from saefeat.study.observe import Subject
from saefeat.study.protocol import Protocol


def zoo_subjects(protocol: Protocol, family: Family, folder: Path) -> list[Subject]:
    """The models of a protocol: those of equal loss, and random ones, which `folder` takes."""
    subjects = [
        Subject(
            shape_label=model.shape.label,
            model_seed=model.seed,
            control="trained",
            source=model.folder,
            n_layers=model.shape.n_layers,
            n_parameters=model.shape.n_parameters,
            n_bytes=model.n_tokens,
            validation_loss=model.validation_loss,
        )
        for model in family.equal_loss
    ]
    for shape in protocol.shapes:
        for seed in protocol.random_seeds:
            source = folder / f"{shape.label}-{seed}"
            if not source.exists():
                write_random_model(source, shape, seed, context_size=protocol.training.context_size)
            subjects.append(
                Subject(
                    shape_label=shape.label,
                    model_seed=seed,
                    control="random",
                    source=source,
                    n_layers=shape.n_layers,
                    n_parameters=shape.n_parameters,
                    n_bytes=0,
                )
            )
    return subjects


def own_subjects(
    models: Sequence[Any], random_models: Sequence[Any], protocol: Protocol
) -> tuple[Protocol, list[Subject]]:
    """Models of one's own, grouped by their shapes; those of one shape are its replicates.

    Args:
        models: What `load_model` takes, each; trained.
        random_models: The same, with random weights.
        protocol: Its shapes, pair and seeds are replaced by those of the models.

    Raises:
        ValueError: They have fewer than two shapes, or of one width, a shape has one model only,
            models of one shape differ in size, or a random model has a shape that no trained one
            has.
    """
    subjects = []
    shapes: dict[str, Shape] = {}
    sizes: dict[str, int] = {}
    for control, sources in (("trained", models), ("random", random_models)):
        n_known: Counter[str] = Counter()
        for source in sources:
            model = load_model(source, device="cpu")
            config = model.cfg
            shape = Shape(n_layers=config.n_layers, d_model=config.d_model, n_heads=config.n_heads)
            if control == "random" and shape.label not in shapes:
                raise ValueError(
                    f"A random model is {shape.label} (layers x width), and the models are "
                    f"{', '.join(shapes)}. As a control it has to have a shape of theirs."
                )
            shapes.setdefault(shape.label, shape)
            n_parameters = n_block_weights(model)
            of_shape = sizes.setdefault(shape.label, n_parameters)
            if n_parameters != of_shape:
                raise ValueError(
                    f"Models of one shape are replicates, but of {shape.label} (layers x width) "
                    f"one has {of_shape:,} weights in its blocks and one {n_parameters:,}. Their "
                    "heads or MLPs differ."
                )
            subjects.append(
                Subject(
                    shape_label=shape.label,
                    model_seed=n_known[shape.label],
                    control=control,
                    source=source,
                    n_layers=shape.n_layers,
                    n_parameters=n_parameters,
                    n_bytes=0,
                    fingerprint=fingerprint(*model.state_dict().values()),
                )
            )
            n_known[shape.label] += 1
        if control == "trained" and (len(n_known) < 2 or min(n_known.values()) < 2):
            raise ValueError(
                "A study compares models of two shapes at least, two of each, got "
                f"{dict(n_known) or 'none'} (layers x width: models)."
            )
    ordered = sorted(shapes.values(), key=lambda shape: shape.d_model)
    return (
        replace(protocol, shapes=tuple(ordered), pair=(ordered[0].label, ordered[-1].label)),
        subjects,
    )
