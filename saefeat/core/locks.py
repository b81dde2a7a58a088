"""One writer at a time in a folder."""

import json
import logging
import os
import socket
import uuid
from types import TracebackType
from typing import Any

from saefeat.core.files import parse_json
from saefeat.core.folders import LocalFolder, RemoteFolder

LOCK_NAME = ".lock"

_log = logging.getLogger(__name__)


class WriterLock:
    """Holds a folder for this process while it writes; a second writer is refused.

    The file `.lock` names the writer. On this machine the kernel holds the lock (`flock`) and
    lets go of it when the process dies, however it dies; elsewhere the file is created only
    where there is none, and a writer that is known to be dead (of this host) is displaced. Both
    take over with a warning in the log.

        with WriterLock(folder) as lock:
            ...
            lock.check()  # before what must not be done by two
    """

    def __init__(self, folder: LocalFolder | RemoteFolder) -> None:
        self._folder = folder
        self._owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "token": uuid.uuid4().hex,
        }
        self._file: int | None = None

    def __enter__(self) -> "WriterLock":
        if isinstance(self._folder, LocalFolder):
            self._take_local(self._folder)
        else:
            self._take_remote(self._folder)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self._is_held():
                self._folder.remove(LOCK_NAME)
        finally:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def check(self) -> None:
        """That the lock is still held.

        Raises:
            BlockingIOError: Someone deleted it, and perhaps another writer has come.
        """
        if not self._is_held():
            raise BlockingIOError(
                f"The lock {self._folder}/{LOCK_NAME} of this process is gone: someone deleted it, "
                "or another writer took the folder. Nothing more is written."
            )

    def _is_held(self) -> bool:
        if self._file is not None and isinstance(self._folder, LocalFolder):
            return _is_same_file(self._file, self._folder)
        return self._holder() == self._owner

    def _take_local(self, folder: LocalFolder) -> None:
        import fcntl

        folder.path.mkdir(parents=True, exist_ok=True)
        while True:
            # A link would have a file elsewhere written over.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
            file = os.open(folder.path / LOCK_NAME, flags, 0o644)
            try:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise self._refusal(self._holder()) from None
                if not _is_same_file(file, folder):
                    # Its holder let go of it, and deleted it, between the two lines above.
                    os.close(file)
                    continue
                holder = _parsed(os.pread(file, 4096, 0))
                # Not every network file system tells another host of the kernel's lock.
                if holder and holder.get("host") != self._owner["host"]:
                    raise self._refusal(holder)
                if holder is not None:
                    self._warn(holder)
                try:
                    os.ftruncate(file, 0)
                    os.pwrite(file, json.dumps(self._owner).encode(), 0)
                except OSError as error:
                    raise OSError(
                        error.errno,
                        f"{folder}/{LOCK_NAME} could not be written ({error.strerror}). Nothing "
                        "was changed",
                    ) from error
            except BaseException:
                os.close(file)
                raise
            self._file = file
            return

    def _take_remote(self, folder: RemoteFolder) -> None:
        file_system, path = folder.file_system, folder.path(LOCK_NAME)
        file_system.makedirs(folder.root, exist_ok=True)
        data = json.dumps(self._owner).encode()
        while True:
            try:
                file_system.pipe_file(path, data, mode="create")
            except FileExistsError:
                holder = self._holder()
                is_dead = (
                    holder is not None
                    and holder.get("host") == self._owner["host"]
                    and not _is_running(holder.get("pid"))
                )
                if not is_dead:
                    raise self._refusal(holder) from None
                self._warn(holder)
                folder.remove(LOCK_NAME)
            else:
                return

    def _holder(self) -> dict[str, Any] | None:
        try:
            return _parsed(self._folder.read(LOCK_NAME))
        except FileNotFoundError:
            return None

    def _warn(self, holder: dict[str, Any] | None) -> None:
        holder = holder or {}
        _log.warning(
            "Process %s of host %s held %s and has died; its lock is taken over.",
            holder.get("pid", "?"),
            holder.get("host", "?"),
            self._folder,
        )

    def _refusal(self, holder: dict[str, Any] | None) -> BlockingIOError:
        holder = holder or {}
        return BlockingIOError(
            f"{self._folder} is being written by process {holder.get('pid', '?')} of host "
            f"{holder.get('host', '?')}, and a folder takes one writer at a time. If that process "
            f"is gone, delete {self._folder}/{LOCK_NAME}."
        )


def _parsed(data: bytes) -> dict[str, Any] | None:
    """The owner that a lock file names; {} if its writer died while it wrote, None if empty."""
    if not data:
        return None
    try:
        value = parse_json(data, LOCK_NAME)
    except ValueError:
        value = {}
    return value if isinstance(value, dict) else {}


def _is_same_file(file: int, folder: LocalFolder) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(folder.path / LOCK_NAME))
    except FileNotFoundError:
        return False


def _is_running(pid: Any) -> bool:
    if not isinstance(pid, int) or pid < 1:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
