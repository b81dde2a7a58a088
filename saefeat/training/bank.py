"""A bank: the dictionaries that one pass over a stream trained together."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from saefeat.activations.hook_names import natural_order
from saefeat.core.hub import OnHub
from saefeat.dictionaries.base import Dictionary
from saefeat.dictionaries.loading import holds_dictionary, load_dictionary

Key = tuple[str, float, int]
"""`(hook_name, expansion_factor, seed)`."""


class Bank(OnHub, Mapping[Key, Dictionary]):
    """Trained dictionaries by `(hook_name, expansion_factor, seed)`, in the order of training."""

    def __init__(self, dictionaries: Mapping[Key, Dictionary]) -> None:
        self._dictionaries = dict(dictionaries)

    def __getitem__(self, key: Key) -> Dictionary:
        try:
            return self._dictionaries[key]
        except KeyError:
            held = ", ".join(map(str, list(self._dictionaries)[:6]))
            raise KeyError(
                f"The bank holds no {key!r}; a key is (hook_name, expansion_factor, seed). "
                f"It holds {len(self)}: {held}{', …' if len(self) > 6 else ''}"
            ) from None

    def __iter__(self) -> Iterator[Key]:
        return iter(self._dictionaries)

    def __len__(self) -> int:
        return len(self._dictionaries)

    def __repr__(self) -> str:
        return f"Bank of {len(self)} dictionaries at {', '.join(self.hooks)}"

    @property
    def hooks(self) -> list[str]:
        """The hook points that its dictionaries read, each once."""
        return list(dict.fromkeys(hook for hooks in self.reads.values() for hook in hooks))

    @property
    def reads(self) -> dict[Key, list[str]]:
        """The hooks that each dictionary reads: its own, but for crosscoders."""
        return {key: list(one.origin.hook_widths or [key[0]]) for key, one in self.items()}

    @property
    def targets(self) -> dict[Key, str]:
        """The hook that each dictionary reconstructs: its own, but for transcoders."""
        return {key: one.origin.target_hook_name or key[0] for key, one in self.items()}

    def needed(self, hooks: Collection[str]) -> list[str]:
        """The hooks that its dictionaries read or reconstruct, each once.

        Raises:
            KeyError: `hooks`, those of a stream, lack one.
        """
        targets = [one.origin.target_hook_name for one in self.values()]
        needed = [name for name in dict.fromkeys([*self.hooks, *targets]) if name is not None]
        missing = [name for name in needed if name not in hooks]
        if missing:
            raise KeyError(
                f"The stream has no hook {missing[0]!r}, which the bank has dictionaries of; it "
                f"has {', '.join(hooks)}. Make the stream with all hooks that they read or predict."
            )
        return needed

    def rows_of(
        self, key: Key, batch: Mapping[str, Float[Tensor, "n _"]]
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_out"]]:
        """What a dictionary reads of a batch, and what it is to reconstruct."""
        origin = self[key].origin
        rows = [batch[hook_name] for hook_name in origin.hook_widths or [key[0]]]
        x = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
        return x, x if origin.target_hook_name is None else batch[origin.target_hook_name]

    def save(self, folder: str | Path) -> Path:
        """Write every dictionary to `folder/<hook_name>/x<expansion_factor>-seed<seed>/`.

        Raises:
            ValueError: A hook's name cannot name a folder.
        """
        for key, dictionary in self.items():
            dictionary.save(dictionary_folder(Path(folder), key))
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> "Bank":
        """Open a run folder, the `saes` folder in it, or the folder of one dictionary.

        Raises:
            FileNotFoundError: It holds no dictionaries. A run writes them at its end.
            ValueError: One is damaged; see `load_dictionary`.
        """
        folder = Path(folder)
        saes = folder / "saes" if (folder / "saes").is_dir() else folder
        paths = sorted(saes.glob("*/*/cfg.json"), key=lambda path: natural_order(str(path)))
        folders = [path.parent for path in paths]
        if not folders and holds_dictionary(folder):
            folders = [folder]
        loaded = [load_dictionary(one) for one in folders]
        if not loaded:
            raise FileNotFoundError(
                f"{folder} holds no trained dictionaries (no saes/<hook>/<label>/cfg.json). "
                "A run writes them when it ends: was it interrupted?"
            )
        return cls({_key(one): one for one in loaded})

    @classmethod
    def _opened(cls, folder: Path) -> "Bank":
        return cls.load(folder)


def _key(dictionary: Dictionary) -> Key:
    origin = dictionary.origin
    expansion_factor = origin.expansion_factor or dictionary.d_sae / dictionary.mean_width
    return dictionary.hook_name, expansion_factor, origin.seed or 0


def dictionary_folder(saes: Path, key: Key) -> Path:
    """Where the `saes` folder of a run holds a dictionary.

    Raises:
        ValueError: See `folder_name`.
    """
    hook_name, expansion_factor, seed = key
    return saes / folder_name(hook_name) / f"x{expansion_factor:g}-seed{seed}"


def folder_name(hook_name: str) -> str:
    """The name of a hook, or of a set of hooks, as that of a folder, which it is as it stands.

    Raises:
        ValueError: It would lead elsewhere, as names in files from others may.
    """
    is_plain = hook_name.isprintable() and not set(hook_name) & {*"/\\"}
    # File systems take 255 bytes, and a temporary name is longer by 34.
    if not is_plain or hook_name in ("", ".", "..") or len(hook_name.encode()) > 200:
        raise ValueError(
            f"The hook name {hook_name[:80]!r} cannot name a folder. Set another by "
            "with_origin(hook_name=...)."
        )
    return hook_name
