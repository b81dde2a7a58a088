"""Where activations come from: text, hooks of a language model, and the stream of both."""

from saefeat.activations.aligned_tokens import load_aligned_tokens
from saefeat.activations.hook_names import resolve_hooks
from saefeat.activations.hook_reader import HookReader
from saefeat.activations.hooks import read_activations
from saefeat.activations.replacing import replaced_activations
from saefeat.activations.store import ActivationStore, cache_activations
from saefeat.activations.stream import ActivationStream
from saefeat.activations.synthetic import SyntheticActivations
from saefeat.activations.tokens import Tokens, load_tokens

__all__ = [
    "ActivationStore",
    "ActivationStream",
    "HookReader",
    "SyntheticActivations",
    "Tokens",
    "cache_activations",
    "load_aligned_tokens",
    "load_tokens",
    "read_activations",
    "replaced_activations",
    "resolve_hooks",
]
