"""A folder of plain files, on this machine or at any URL that fsspec opens.

Files are written whole: on this machine by a rename, elsewhere by one upload, which object stores
(S3, GCS, Azure) show only once it has ended. Names are those of files directly in the folder.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from saefeat.core.files import write_bytes


@runtime_checkable
class Folder(Protocol):
    """What a store needs of the place that it lies in."""

    def __str__(self) -> str:
        """The path or URL, as an error names it."""
        ...

    def sizes(self) -> dict[str, int]:
        """Bytes of every file by name, hidden ones included; empty if there is no folder."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Puts a file there, whole or not at all, in the place of an older one."""
        ...

    def read(self, name: str) -> bytes:
        """All of a file.

        Raises:
            FileNotFoundError: There is no such file.
        """
        ...

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Bytes `start` up to `stop` of a file, for each range.

        Raises:
            OSError: There is no such file, or it cannot be read.
        """
        ...

    def remove(self, name: str) -> None:
        """Deletes a file; it is no error if there is none."""
        ...


class LocalFolder:
    """A folder of this machine."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    def sizes(self) -> dict[str, int]:
        if self.path.is_file():
            raise FileExistsError(f"{self.path} is a file, and a folder is needed.")
        if not self.path.is_dir():
            return {}
        sizes = {}
        for path in self.path.iterdir():
            # A writer may have renamed it meanwhile, and a link may lead nowhere.
            with suppress(FileNotFoundError):
                sizes[path.name] = path.stat().st_size
        return sizes

    def write(self, name: str, data: bytes) -> None:
        write_bytes(self.path / name, data)

    def read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            raise FileNotFoundError(f"There is no file {self.path / name}.") from None

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        with (self.path / name).open("rb") as file:
            return [os.pread(file.fileno(), stop - start, start) for start, stop in ranges]

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)


class RemoteFolder:
    """A folder of any file system that fsspec knows."""

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        from fsspec.core import url_to_fs

        self.url = url.rstrip("/")
        self.file_system, root = url_to_fs(url, **(storage_options or {}))
        self.root: str = root.rstrip("/")

    def __str__(self) -> str:
        return self.url

    def path(self, name: str) -> str:
        """Where a file lies within the file system."""
        return f"{self.root}/{name}"

    def sizes(self) -> dict[str, int]:
        # Another process may have written since the last listing.
        self.file_system.invalidate_cache()
        try:
            found = self.file_system.ls(self.root, detail=True)
        except FileNotFoundError:
            return {}
        return {
            Path(one["name"]).name: self._size(one)
            for one in found
            if one["name"].rstrip("/") != self.root
        }

    def _size(self, one: Mapping[str, Any]) -> int:
        """Bytes of what a listing names; one over HTTP does not say how many they are."""
        size = one["size"]
        if size is None and one["type"] == "file":
            size = self.file_system.size(one["name"])
        return int(size or 0)

    def write(self, name: str, data: bytes) -> None:
        self.file_system.makedirs(self.root, exist_ok=True)
        self.file_system.pipe_file(self.path(name), data)

    def read(self, name: str) -> bytes:
        try:
            data: bytes = self.file_system.cat_file(self.path(name))
        except FileNotFoundError:
            raise FileNotFoundError(f"There is no file {self.url}/{name}.") from None
        return data

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        paths = [self.path(name)] * len(ranges)
        starts, stops = zip(*ranges, strict=True) if ranges else ((), ())
        found: list[Any] = self.file_system.cat_ranges(paths, list(starts), list(stops))
        # fsspec gives errors back in the place of bytes; not every version can be told to raise.
        for one in found:
            if isinstance(one, Exception):
                raise one
        return found

    def remove(self, name: str) -> None:
        if self.file_system.exists(self.path(name)):
            self.file_system.rm_file(self.path(name))


def open_folder(
    place: str | Path, storage_options: Mapping[str, Any] | None = None
) -> LocalFolder | RemoteFolder:
    """The folder at a path or URL; nothing is made or read yet.

    Args:
        place: A path, or a URL such as "s3://bucket/acts".
        storage_options: What the file system of the URL is told, credentials for one.

    Raises:
        ValueError: fsspec does not know the protocol.
        ImportError: The package for it (s3fs, gcsfs, …) is not installed.
    """
    if isinstance(place, Path) or ("://" not in place and "::" not in place):
        return LocalFolder(place)
    if place.startswith(("file://", "local://")):
        return LocalFolder(place.partition("://")[2])
    return RemoteFolder(place, storage_options)
