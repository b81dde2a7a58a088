"""Small decoders of equal size and unequal shape, trained here: what the study compares.

`shapes` solves for them, `text`, `tokenizer`, `corpus` and `windows` make what they read, `network`
computes a step of theirs, `optimisation` and `training` make the steps, `family` trains many to
one loss, `decoder` writes the folders that `load_model` opens.
"""

from saefeat.models.zoo.decoder import random_model, write_random_model
from saefeat.models.zoo.family import Family, train_family
from saefeat.models.zoo.options import TrainingOptions
from saefeat.models.zoo.record import ZooModel, read_model
from saefeat.models.zoo.shapes import (
    DEEPER_THAN_A,
    FAMILY,
    SHALLOWER_THAN_A,
    A,
    B,
    BudgetedShape,
    Shape,
    budget,
)
from saefeat.models.zoo.text import Text, load_text
from saefeat.models.zoo.training import train_model

__all__ = [
    "DEEPER_THAN_A",
    "FAMILY",
    "SHALLOWER_THAN_A",
    "A",
    "B",
    "BudgetedShape",
    "Family",
    "Shape",
    "Text",
    "TrainingOptions",
    "ZooModel",
    "budget",
    "load_text",
    "random_model",
    "read_model",
    "train_family",
    "train_model",
    "write_random_model",
]
