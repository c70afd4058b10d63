"""One run at a time in a directory: a file there that a run holds locked for as long as it lives.

The system lets go of the lock when the process ends, however it ends, so a file that a killed run
left behind stops nobody.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from lowtide.errors import LowtideWarning, OutputError

LOCK_FILE = ".lowtide-lock"
_HELD = (errno.EWOULDBLOCK, errno.EACCES)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a directory's lock.

    Args:
        directory: exists and can be written.

    Yields:
        None; on leaving, the lock's file is removed.

    Raises:
        OutputError: another run holds it, and which.
        OSError: the lock's file cannot be made.
    """
    path = directory / LOCK_FILE
    descriptor = _acquire(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # while it is held, so that nobody else's is removed
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor, path)
            if _is_still(path, descriptor):
                _tell_who(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # of a run that ended between opening and locking


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            raise OutputError(
                f"--adapter-path {path.parent} is in use by another run{_holder(descriptor)}. "
                "Wait for it or end it, or choose another directory."
            ) from None
        warnings.warn(
            f"{path.parent} cannot be locked ({error.strerror}); see that no other run writes "
            "there.",
            LowtideWarning,
            stacklevel=2,
        )


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(descriptor))


def _tell_who(descriptor: int) -> None:
    now = datetime.now().astimezone().isoformat(" ", "seconds")
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now})
    with contextlib.suppress(OSError):  # on a full disk the lock alone must do
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)


def _holder(descriptor: int) -> str:
    try:
        held = json.loads(os.pread(descriptor, 4096, 0))
        return f": process {held['pid']} on {held['host']}, since {held['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
