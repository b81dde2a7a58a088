"""What `saefeat cache` does: the activations of a model on a text, into a store."""

from collections.abc import Sequence
from pathlib import Path

from saefeat.activations.store import ActivationStore, cache_activations
from saefeat.activations.stream import ActivationStream
from saefeat.job import read_text
from saefeat.models.load import load_model
from saefeat.models.packaged import quiet_transformers


def cache_text(
    *,
    model: str,
    text: Path,
    hooks: Sequence[str],
    out: str,
    tokens: int | None = None,
    context_size: int = 128,
    dtype: str | None = None,
    seed: int = 0,
    resume: bool = False,
    append: bool = False,
    progress: bool = True,
) -> ActivationStore:
    """Writes the activations of a model on a text to a store.

    Args:
        model: As for `load_model`.
        text: A text file or folder.
        hooks: Names or patterns.
        out: A new folder, or a URL.
        tokens: Rows to store for training; None for all that the text gives.
        context_size: Tokens in a context; as many as the model reads if those are fewer.
        dtype: As for `cache_activations`, like the rest.
        seed: Decides the order of documents and rows.
        resume: Goes on with an interrupted call.
        append: Adds to what is there.
        progress: Whether to draw a progress bar on standard error.

    Raises:
        ValueError: An option is out of range, a hook is unknown, or there is too little text.
        OSError: A file or folder is missing, in the way, or being written; or the disk is full.
    """
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens={tokens} is too few; at least one must be stored.")
    with quiet_transformers():
        language_model = load_model(model)
    corpus = read_text(text, language_model, n_rows=tokens, context_size=context_size, seed=seed)
    stream = ActivationStream.from_model(language_model, corpus, hooks, seed=seed)
    return cache_activations(
        stream,
        out,
        tokens,
        dtype=dtype,
        resume=resume,
        append=append,
        progress=progress,
    )
