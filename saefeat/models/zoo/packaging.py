"""How the models in `models/tiny` were made; see `COMMAND`."""

import sys
from pathlib import Path

import torch

from saefeat.core.files import publish_folder, temporary_folder
from saefeat.models.packaged import TINY_MODELS
from saefeat.models.zoo.decoder import read_weights, write_model
from saefeat.models.zoo.family import train_family
from saefeat.models.zoo.record import ZooModel
from saefeat.models.zoo.shapes import A, B

COMMAND = "python -m saefeat.models.zoo.packaging saefeat/models/tiny"


def package(model: ZooModel, folder: Path) -> None:
    """Write a byte-level model in bfloat16, half as large, with its record."""
    record = model.record() | {"command": COMMAND}
    with temporary_folder(folder) as draft:
        write_model(
            draft,
            model.shape,
            read_weights(model.folder),
            tokenizer=(model.folder / "tokenizer.json").read_text(),
            context_size=record["options"]["context_size"],
            record=record,
            dtype=torch.bfloat16,
        )
        publish_folder(draft, folder)


def main(out: Path) -> None:
    """Train A and B with four seeds each, as the study does, and package the first of each."""
    family = train_family((A, B), (0, 1, 2, 3))
    for shape, name in zip((A, B), TINY_MODELS, strict=True):
        first = next(model for model in family.equal_loss if model.shape == shape)
        package(first, out / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
