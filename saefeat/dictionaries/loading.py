"""`load_dictionary`: opens a dictionary, whichever library wrote it."""

from pathlib import Path

from saefeat.dictionaries import peers, sae_lens
from saefeat.dictionaries.base import Dictionary
from saefeat.dictionaries.found import build

LAYOUTS = {
    ("cfg.json", "sae_weights.safetensors"): sae_lens.find,
    ("cfg.json", "sae.safetensors"): peers.find_sparsify,
    ("config.json", "ae.pt"): peers.find_dictionary_learning,
    ("params.npz",): peers.find_gemma_scope,
}
"""The files that tell whose layout a folder has, and what reads it."""


def holds_dictionary(folder: Path) -> bool:
    """Whether `load_dictionary` knows the layout of a folder."""
    return any(all((folder / name).is_file() for name in files) for files in LAYOUTS)


def load_dictionary(source: str | Path, sae_id: str | None = None) -> Dictionary:
    """Open a dictionary from a folder, or from SAELens's registry.

    Args:
        source: A folder that `Dictionary.save`, SAELens (5 or 6), Gemma Scope, sparsify or
            dictionary_learning wrote; or, with `sae_id`, a release of SAELens's registry.
        sae_id: The dictionary of that release.

    Returns:
        The dictionary, on the processor, reading raw activations.

    Raises:
        FileNotFoundError: There is no such folder, or it holds no dictionary.
        ModuleNotFoundError: A release was asked for and SAELens is not installed.
        ValueError: A file is damaged, or its architecture, keys or shapes are not known.
    """
    if sae_id is not None:
        return build(sae_lens.from_pretrained(str(source), sae_id))
    folder = Path(source)
    for files, find in LAYOUTS.items():
        if all((folder / name).is_file() for name in files):
            return build(find(folder))
    wanted = "; ".join(" and ".join(files) for files in LAYOUTS)
    if (folder / "cfg.json").is_file():
        raise FileNotFoundError(
            f"{folder} has a cfg.json and no weights beside it. Expected {wanted}."
        )
    raise FileNotFoundError(
        f"{folder} holds no dictionary. Expected a folder with {wanted}; for a release of "
        "SAELens's registry give its sae_id too."
    )
