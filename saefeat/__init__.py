"""Sparse dictionaries on language-model activations, and trustworthy counts of features.

The names below load on first use: `import saefeat` by itself loads not even torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from saefeat import metrics as metrics
    from saefeat import study as study
    from saefeat import superposition as superposition
    from saefeat.activations.aligned_tokens import load_aligned_tokens as load_aligned_tokens
    from saefeat.activations.hooks import read_activations as read_activations
    from saefeat.activations.store import ActivationStore as ActivationStore
    from saefeat.activations.store import cache_activations as cache_activations
    from saefeat.activations.stream import ActivationStream as ActivationStream
    from saefeat.activations.synthetic import SyntheticActivations as SyntheticActivations
    from saefeat.activations.tokens import Tokens as Tokens
    from saefeat.activations.tokens import load_tokens as load_tokens
    from saefeat.core.distributed import process_group as process_group
    from saefeat.dictionaries.base import Dictionary as Dictionary
    from saefeat.dictionaries.batch_topk import BatchTopKConfig as BatchTopKConfig
    from saefeat.dictionaries.crosscoder import CrosscoderConfig as CrosscoderConfig
    from saefeat.dictionaries.crosscoder import L1CrosscoderConfig as L1CrosscoderConfig
    from saefeat.dictionaries.gated import GatedConfig as GatedConfig
    from saefeat.dictionaries.jump_relu import JumpReLUConfig as JumpReLUConfig
    from saefeat.dictionaries.loading import load_dictionary as load_dictionary
    from saefeat.dictionaries.matching_pursuit import MatchingPursuitConfig as MatchingPursuitConfig
    from saefeat.dictionaries.matryoshka import MatryoshkaConfig as MatryoshkaConfig
    from saefeat.dictionaries.standard import StandardConfig as StandardConfig
    from saefeat.dictionaries.topk import TopKConfig as TopKConfig
    from saefeat.kernels.codes import Codes as Codes
    from saefeat.models.load import load_model as load_model
    from saefeat.report.measure import measure as measure
    from saefeat.report.record import Report as Report
    from saefeat.superposition.calibration import calibrate as calibrate
    from saefeat.superposition.calibration.calibrated_count import (
        CalibratedCount as CalibratedCount,
    )
    from saefeat.superposition.counting import count_features as count_features
    from saefeat.superposition.counting.feature_count import FeatureCount as FeatureCount
    from saefeat.superposition.sae_counts import sae_counts as sae_counts
    from saefeat.superposition.universality.measure import universality as universality
    from saefeat.superposition.universality.result import Universality as Universality
    from saefeat.superposition.universality.widths import AcrossWidths as AcrossWidths
    from saefeat.superposition.universality.widths import across_widths as across_widths
    from saefeat.training.bank import Bank as Bank
    from saefeat.training.callbacks import Callback as Callback
    from saefeat.training.loggers import JSONLines as JSONLines
    from saefeat.training.loggers import TensorBoard as TensorBoard
    from saefeat.training.loggers import WeightsAndBiases as WeightsAndBiases
    from saefeat.training.plan import Plan as Plan
    from saefeat.training.plan import plan as plan
    from saefeat.training.trainer import train as train

_HOMES = {
    "AcrossWidths": "saefeat.superposition.universality.widths",
    "ActivationStore": "saefeat.activations.store",
    "ActivationStream": "saefeat.activations.stream",
    "Bank": "saefeat.training.bank",
    "Callback": "saefeat.training.callbacks",
    "CalibratedCount": "saefeat.superposition.calibration.calibrated_count",
    "Codes": "saefeat.kernels.codes",
    "Dictionary": "saefeat.dictionaries.base",
    "FeatureCount": "saefeat.superposition.counting.feature_count",
    "JSONLines": "saefeat.training.loggers",
    "Plan": "saefeat.training.plan",
    "Report": "saefeat.report.record",
    "SyntheticActivations": "saefeat.activations.synthetic",
    "TensorBoard": "saefeat.training.loggers",
    "Tokens": "saefeat.activations.tokens",
    "Universality": "saefeat.superposition.universality.result",
    "WeightsAndBiases": "saefeat.training.loggers",
    "StandardConfig": "saefeat.dictionaries.standard",
    "CrosscoderConfig": "saefeat.dictionaries.crosscoder",
    "L1CrosscoderConfig": "saefeat.dictionaries.crosscoder",
    "GatedConfig": "saefeat.dictionaries.gated",
    "BatchTopKConfig": "saefeat.dictionaries.batch_topk",
    "JumpReLUConfig": "saefeat.dictionaries.jump_relu",
    "MatryoshkaConfig": "saefeat.dictionaries.matryoshka",
    "MatchingPursuitConfig": "saefeat.dictionaries.matching_pursuit",
    "TopKConfig": "saefeat.dictionaries.topk",
    "across_widths": "saefeat.superposition.universality.widths",
    "cache_activations": "saefeat.activations.store",
    "calibrate": "saefeat.superposition.calibration",
    "count_features": "saefeat.superposition.counting",
    "load_aligned_tokens": "saefeat.activations.aligned_tokens",
    "load_dictionary": "saefeat.dictionaries.loading",
    "load_model": "saefeat.models.load",
    "load_tokens": "saefeat.activations.tokens",
    "measure": "saefeat.report.measure",
    "plan": "saefeat.training.plan",
    "process_group": "saefeat.core.distributed",
    "read_activations": "saefeat.activations.hooks",
    "sae_counts": "saefeat.superposition.sae_counts",
    "train": "saefeat.training.trainer",
    "universality": "saefeat.superposition.universality.measure",
}
"""Where each public name is defined."""

_ROOMS = ("metrics", "study", "superposition")
"""Modules that are public as a whole."""

__all__ = [*sorted(_HOMES), *_ROOMS]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    elif name in _ROOMS:
        value = import_module(f"saefeat.{name}")
    else:
        raise AttributeError(f"module 'saefeat' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
