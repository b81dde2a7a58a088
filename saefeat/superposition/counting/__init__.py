"""Counting features by what several random starts agree on.

From `count`, the one call, downward: `search` chooses the settings, `pursuit` fits the dictionaries
to `layer_rows`, `agreement` compares them, and `conclusion` makes a `feature_count` of it.
"""

from saefeat.superposition.counting.count import count_features
from saefeat.superposition.counting.feature_count import FeatureCount

__all__ = ["FeatureCount", "count_features"]
