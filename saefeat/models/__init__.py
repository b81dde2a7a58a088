"""Language models: loading them by name, folder or object."""

from saefeat.models.load import load_model

__all__ = ["load_model"]
