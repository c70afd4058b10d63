"""Token caches by what is in them: the same data, tokenizer and settings are tokenised once.

An entry is a directory named after a key, the checksum of all that decides its content. It holds
the caches, and entry.json with their checksums, so that one which is cut off, altered or foreign
is never used but made again. It is built under another name, in one process at a time, and renamed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowtide.data.cache import unwritable
from lowtide.data.text import unreadable
from lowtide.errors import OutputError

ENTRY_FILE = "entry.json"
_BUILDING = ".building-"
_YOUNG_S = 3600


def checksum(path: Path) -> str:
    """SHA-256 of a file, read in pieces.

    Args:
        path: The file.

    Returns:
        Hexadecimal digits.

    Raises:
        DataError: It cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from None


def key_of(parts: Mapping[str, Any]) -> str:
    """The name of an entry.

    Args:
        parts: All that decides what is in it, as JSON can hold it.

    Returns:
        Hexadecimal digits.
    """
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


class TokenStore:
    """The entries in one directory.

    Args:
        root: The directory; it is made when the first entry is built.
        builder: A name that no other process has, for what is being built.
    """

    def __init__(self, root: Path, builder: str) -> None:
        self._root, self._builder = root, builder

    def path(self, key: str) -> Path:
        """Where the entry of a key lies, or would."""
        return self._root / key

    def find(self, key: str) -> dict[str, Any] | None:
        """What entry.json says, if every file of the entry is as it was written."""
        path = self.path(key)
        try:
            entry: dict[str, Any] = json.loads((path / ENTRY_FILE).read_bytes())
            for name, digest in entry["files"].items():
                with open(path / name, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                        return None
            if entry["key"] != key:
                return None
            with contextlib.suppress(OSError):  # somebody else's, perhaps
                os.utime(path)  # what was used last stays longest
            return entry
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    @contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Keep others from building this entry; waits while another does.

        Args:
            key: Of the entry.

        Yields:
            Nothing.

        Raises:
            OutputError: The directory cannot be written.
        """
        try:
            self._root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self._root, error) from None
        with _lock(_lock_path(self._root, key), wait=True):
            self._sweep(key)
            yield

    @contextmanager
    def building(self, key: str) -> Iterator[Path]:
        """A directory to build an entry in; it is gone at the end. Needs `locked`.

        Args:
            key: Of the entry.

        Yields:
            The directory.

        Raises:
            OutputError: It cannot be made.
        """
        path = self._root / f"{_BUILDING}{key}-{self._builder}"
        try:
            path.mkdir()
        except OSError as error:
            raise unwritable(path, error) from None
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def put(self, key: str, built: Path, names: Sequence[str], about: Mapping[str, Any]) -> None:
        """Give a built entry its name, replacing one that `find` refused.

        Args:
            key: Of the entry.
            built: The directory that `building` gave.
            names: The caches in it.
            about: What `find` will return beside the checksums.

        Raises:
            OutputError: The disk is full.
        """
        files = {name: checksum(built / name) for name in names}
        text = json.dumps({"key": key, "files": files, **about}, default=str, indent=1)
        final = self.path(key)
        try:
            with open(built / ENTRY_FILE, "wb") as file:
                file.write(text.encode("utf-8", "surrogateescape"))
                file.flush()
                os.fsync(file.fileno())
            if final.is_dir():
                os.replace(final, built / "refused")
            else:
                final.unlink(missing_ok=True)
            os.rename(built, final)
        except OSError as error:
            raise unwritable(final, error) from None
        shutil.rmtree(final / "refused", ignore_errors=True)

    def prune(self, most_bytes: int) -> None:
        """Remove entries, those first that were not used for longest, until the rest is small.

        What was used within the last hour stays: another run may be about to open it. Those that
        are open already keep their data until they are closed.

        Args:
            most_bytes: Of all entries together.
        """
        entries = []
        for path in self._root.glob("[!.]*"):
            with contextlib.suppress(OSError):
                if (path / ENTRY_FILE).is_file():
                    size = sum(file.stat().st_size for file in path.iterdir())
                    entries.append((path.stat().st_mtime, size, path))
        total = sum(size for _, size, _ in entries)
        for used, size, path in sorted(entries):
            if total <= most_bytes or used > time.time() - _YOUNG_S:
                return
            with contextlib.suppress(OutputError, OSError):
                total -= size * self._remove(path)

    def _remove(self, path: Path) -> bool:
        """Remove an entry, unless somebody is at it; nobody finds a part of it."""
        with _lock(_lock_path(self._root, path.name), wait=False) as ours:
            if ours:
                gone = self._root / f"{_BUILDING}{path.name}-{self._builder}"
                os.rename(path, gone)
                shutil.rmtree(gone, ignore_errors=True)
            return ours

    def _sweep(self, held: str) -> None:
        """Remove what processes that were killed left behind."""
        for path in self._root.glob(f"{_BUILDING}*"):
            key = _key_built(path)
            if key == held:
                shutil.rmtree(path, ignore_errors=True)
                continue
            with _lock(_lock_path(self._root, key), wait=False) as ours:
                if ours:
                    shutil.rmtree(path, ignore_errors=True)


def remove_unfinished(root: Path, builder: str) -> None:
    """Remove what a process was building when it was ended.

    Args:
        root: The directory of the entries.
        builder: As its `TokenStore` was given.
    """
    for path in root.glob(f"{_BUILDING}*-{builder}"):
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OutputError), _lock(_lock_path(root, _key_built(path)), False):
            pass  # its file goes with the lock, unless somebody else builds the entry by now


def _key_built(path: Path) -> str:
    """The key of the entry that is built in a directory."""
    return path.name.removeprefix(_BUILDING).partition("-")[0]


def _lock_path(root: Path, key: str) -> Path:
    return root / f".{key}.lock"


@contextmanager
def _lock(path: Path, wait: bool) -> Iterator[bool]:
    """Hold a lock file, which is removed with the lock; yields whether it is held.

    Whoever waited may hold the lock of a file that has been removed meanwhile, and tries again.
    Where the file system knows no locks, everybody holds it: entries are put in place by a rename
    all the same.
    """
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise unwritable(path, error) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(file)
            yield False
            return
        except OSError:
            break
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                break
        os.close(file)
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)
        os.close(file)
