"""Whether two dictionaries, of two models, layers or seeds, have the same features."""

from saefeat.superposition.universality.aligned import aligned_batches
from saefeat.superposition.universality.correlation import Correlations, correlate
from saefeat.superposition.universality.geometry import (
    Similarity,
    matched_rsa,
    matched_svcca,
    mmcs,
    mmcs_null,
    mmcs_null_like,
    rsa,
    svcca,
)
from saefeat.superposition.universality.latent_rows import Centred, centred, rows_of_codes
from saefeat.superposition.universality.measure import universality
from saefeat.superposition.universality.result import MaxCosines, Universality
from saefeat.superposition.universality.score import Estimate, Score
from saefeat.superposition.universality.widths import AcrossWidths, across_widths

__all__ = [
    "AcrossWidths",
    "Centred",
    "Correlations",
    "Estimate",
    "MaxCosines",
    "Score",
    "Similarity",
    "Universality",
    "across_widths",
    "aligned_batches",
    "centred",
    "correlate",
    "matched_rsa",
    "matched_svcca",
    "mmcs",
    "mmcs_null",
    "mmcs_null_like",
    "rows_of_codes",
    "rsa",
    "svcca",
    "universality",
]
