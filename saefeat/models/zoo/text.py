"""Text to train small models on: bytes of documents, a share of them held out."""

import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

NO_TEXT = ("__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test")
"""Folders of the standard library that are left out: no sources, others' sources, or tests."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Text:
    """Documents as bytes."""

    train: tuple[bytes, ...]
    """Documents to train on."""
    held_out: tuple[bytes, ...]
    """Documents that no training sees."""
    name: str
    """What a record calls it."""

    @property
    def n_train_bytes(self) -> int:
        """Bytes to train on."""
        return sum(map(len, self.train))

    @property
    def n_held_out_bytes(self) -> int:
        """Bytes held out."""
        return sum(map(len, self.held_out))

    @property
    def digest(self) -> str:
        """A hash of all documents, in hexadecimal."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.train, self.held_out):
            digest.update(len(part).to_bytes(8, "little"))
            for document in part:
                digest.update(len(document).to_bytes(8, "little"))
                digest.update(document)
        return digest.hexdigest()


def load_text(
    source: str | Path | Sequence[str | bytes] | None = None,
    *,
    held_out_fraction: float = 0.05,
    pattern: str = "**/*",
) -> Text:
    """Documents in an order that depends on nothing but their names, or contents.

    Files are ordered by a hash of their path within the folder, so that the same files are held
    out of Python 3.11's standard library and of 3.12's. The first of that order are held out,
    as many as it takes to reach the share of the bytes. Of a single document the end is.

    Args:
        source: A file or folder, or the documents themselves; None for the sources of Python's
            standard library without its tests (11 MB in Python 3.11).
        held_out_fraction: Share of the bytes that is held out, above 0 and below 1.
        pattern: The files of a folder that count.

    Raises:
        FileNotFoundError: There is no such file or folder, or no file in it matches.
        ValueError: The documents are empty, or the share is none.
    """
    if not 0 < held_out_fraction < 1:
        raise ValueError(f"held_out_fraction={held_out_fraction} is not between 0 and 1.")
    if source is None:
        folder = Path(sysconfig.get_path("stdlib"))
        files = [
            path
            for path in folder.rglob("*.py")
            if not set(path.relative_to(folder).parts) & set(NO_TEXT)
        ]
        name = f"standard library of Python {sysconfig.get_python_version()}"
        named = [(str(path.relative_to(folder)), path.read_bytes()) for path in files]
    elif isinstance(source, str | Path):
        name, named = Path(source).name, _read(Path(source).expanduser(), pattern)
    else:
        name = f"{len(source)} documents"
        encoded = [one.encode() if isinstance(one, str) else bytes(one) for one in source]
        named = [(hashlib.blake2b(one).hexdigest(), one) for one in encoded]
    ordered = [
        document
        for _, document in sorted(
            (hashlib.blake2b(key.encode()).digest(), document) for key, document in named
        )
        if document
    ]
    return _split(ordered, held_out_fraction, name)


def _split(documents: list[bytes], fraction: float, name: str) -> Text:
    n_bytes = sum(map(len, documents))
    if n_bytes < 2:
        raise ValueError(
            f"The text ({name}) holds {n_bytes} bytes, too few to train on some and hold others "
            "out. Is it empty?"
        )
    if len(documents) == 1:
        cut = len(documents[0]) - max(1, round(fraction * n_bytes))
        cut = max(cut, 1)
        return Text(train=(documents[0][:cut],), held_out=(documents[0][cut:],), name=name)
    n_held_out, n_held_out_bytes = 0, 0
    for document in documents[:-1]:
        n_held_out += 1
        n_held_out_bytes += len(document)
        if n_held_out_bytes >= fraction * n_bytes:
            break
    held_out, train = documents[:n_held_out], documents[n_held_out:]
    return Text(train=tuple(train), held_out=tuple(held_out), name=name)


def _read(path: Path, pattern: str) -> list[tuple[str, bytes]]:
    if path.is_file():
        return [(path.name, path.read_bytes())]
    if not path.is_dir():
        raise FileNotFoundError(
            f"There is no file or folder {path}. To give the text itself, put it in a list."
        )
    files: Iterable[Path] = (file for file in path.glob(pattern) if file.is_file())
    named = [(file.relative_to(path).as_posix(), file.read_bytes()) for file in files]
    if not named:
        raise FileNotFoundError(f"No file in the folder {path} matches the pattern {pattern!r}.")
    return named
