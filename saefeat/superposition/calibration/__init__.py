"""How many features there are where SAEs have found so many: read off simulated layers."""

from saefeat.superposition.calibration.calibrate import calibrate
from saefeat.superposition.calibration.calibrated_count import CalibratedCount

__all__ = ["CalibratedCount", "calibrate"]
