"""What `saefeat export` does: dictionaries as folders that SAELens opens."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from saefeat.core.files import check_unclaimed
from saefeat.core.progress import progress_bar
from saefeat.dictionaries.base import Dictionary
from saefeat.dictionaries.crosscoder import AcrossHooks
from saefeat.dictionaries.loading import holds_dictionary
from saefeat.dictionaries.sae_lens import SAE_LENS_ARCHITECTURES
from saefeat.training.bank import Bank, dictionary_folder, folder_name


def export(
    source: Path, out: Path, *, hooks: tuple[str, ...] = ("*",), progress: bool = True
) -> list[Path]:
    """Write dictionaries to `out/<hook_name>/x<expansion_factor>-seed<seed>/`, or one to `out`.

    A crosscoder, which SAELens does not have, becomes a dictionary of each of its hooks
    (`Crosscoder.layer`), in `out/<its name>/<hook_name>/`.

    Args:
        source: The folder of a run, or of a dictionary that `load_dictionary` opens: SAELens,
            Gemma Scope, sparsify, dictionary_learning.
        out: A new folder.
        hooks: Names or patterns of those that are wanted.
        progress: Whether to draw a progress bar on standard error.

    Returns:
        The folders, each of which `sae_lens.SAE.load_from_disk` opens.

    Raises:
        FileNotFoundError: There is no dictionary in `source`.
        FileExistsError: `out` already holds files.
        ValueError: No dictionary is of such a hook, or one is of a kind that SAELens does not have:
            matching pursuit, or a transcoder whose latents are neither ReLU nor JumpReLU.
    """
    bank = Bank.load(source)
    check_unclaimed(out, "set of dictionaries")
    wanted = {
        place: one
        for place, one in _exportable(bank, is_one=holds_dictionary(source))
        if one.hook_name in hooks or any(fnmatchcase(one.hook_name, name) for name in hooks)
    }
    if not wanted:
        raise ValueError(
            f"No dictionary in {source} is of {' or '.join(hooks)}; it has {', '.join(bank.hooks)}."
        )
    for one in wanted.values():
        if one.sae_lens_architecture not in SAE_LENS_ARCHITECTURES:
            raise ValueError(
                f"SAELens has no {one.sae_lens_architecture}, which the dictionary of "
                f"{one.hook_name} in {source} is. sf.load_dictionary opens it where it is."
            )
    folders = []
    with progress_bar(
        total=len(wanted), unit="dictionary", desc="exporting", shown=progress
    ) as bar:
        for place, one in wanted.items():
            folders.append(one.save(out / place))
            bar.update()
    return folders


def _exportable(bank: Bank, *, is_one: bool) -> Iterator[tuple[Path, Dictionary]]:
    """Each dictionary that SAELens can have, and where it goes."""
    for key, one in bank.items():
        if isinstance(one, AcrossHooks):
            for hook_name in one.hook_widths:
                layer = one.layer(hook_name)
                yield dictionary_folder(Path(folder_name(key[0])), (hook_name, *key[1:])), layer
        else:
            yield Path() if is_one else dictionary_folder(Path(), key), one
