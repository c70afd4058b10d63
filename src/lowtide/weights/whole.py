"""A directory that is whole or not there: filled under a hidden name beside it, then renamed.

Whenever the process or the machine stops, the directory is what it was before or what it was to
become. What is left under the hidden name is removed by the next call for the same directory.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowtide.errors import OutputError

from .writer import sync_directory

_SPARE_BYTES = 1 << 20
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # fcntl.h, linux/fs.h


@contextmanager
def whole_directory(out: Path, *, replaces: bool) -> Iterator[Path]:
    """Fill a directory, all or nothing.

    Args:
        out: the directory; its parents are made where they do not exist.
        replaces: whether one that holds something is replaced; else it must be empty or absent.

    Yields:
        The directory to write to, empty; files in it must be flushed to the disk by whoever writes
        them. When the block ends it becomes `out`; when the block raises it is removed.

    Raises:
        OutputError: the disk is full or cannot be written, or another process fills `out`.
    """
    out = Path(os.path.realpath(out))
    hidden, aside = (out.with_name(f".{out.name}.lowtide-{kind}") for kind in ("new", "old"))
    absent = [path for path in out.parents if not path.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _held(hidden, out)
        try:
            _put_back(aside, out)
            for left in hidden.iterdir():
                _remove(left)
            yield hidden
            sync_directory(hidden)
            _publish(hidden, aside, out, replaces)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)  # what was replaced, or what was not finished
            os.close(descriptor)
    except OSError as error:
        raise unwritable(out, error) from error
    finally:
        with contextlib.suppress(OSError):  # the first that is not empty, or was not made
            for path in absent:
                path.rmdir()


def check_free_space(out: Path, needed: int) -> None:
    """Refuse before anything is written where the disk has no room.

    Args:
        out: a file or directory to be written; it need not exist.
        needed: bytes.

    Raises:
        OutputError: says what is free and what is needed.
    """
    place = out.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    disk = shutil.disk_usage(place)
    if disk.free < needed + _SPARE_BYTES and disk.total > 0:  # no total: not a disk
        held = ", beside what it holds already," if out.exists() else ""
        raise OutputError(
            f"the disk of {out} has {disk.free / 1e6:,.1f} MB free, and the result{held} needs "
            f"{(needed + _SPARE_BYTES) / 1e6:,.1f} MB. Free some space, or choose another --out."
        )


def unwritable(out: Path, error: OSError) -> OutputError:
    """What to raise where `out` could not be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "Free some space, or choose another --out" if full else "Choose another --out"
    if error.errno == errno.EBUSY:
        remedy = "It is in use by the system (a mount?); name a new directory in it"
    return OutputError(
        f"{out} cannot be written: {error.strerror}. {remedy}; what was there before is unchanged."
    )


def _held(hidden: Path, out: Path) -> int:
    """A descriptor that holds the hidden directory's lock; the system lets go of it at any end."""
    while True:
        hidden.mkdir(exist_ok=True)
        try:
            descriptor = os.open(hidden, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # another process has just finished
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if hidden.exists() and os.path.samestat(os.stat(hidden), os.fstat(descriptor)):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise OutputError(
                f"another lowtide process is writing {out}. Wait until it has ended, or choose "
                "another --out."
            ) from error
        os.close(descriptor)  # of a process that ended between opening and locking


def _publish(hidden: Path, aside: Path, out: Path, replaces: bool) -> None:
    """Give the hidden directory its name; what had the name is then under a hidden one."""
    if not (replaces and out.is_dir() and any(out.iterdir())):
        os.rename(hidden, out)  # of an empty directory too; refused where it is not empty
    elif not _exchange(hidden, out):
        os.rename(out, aside)  # a system without exchange: for a moment there is neither
        os.rename(hidden, out)
    sync_directory(out.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _put_back(aside: Path, out: Path) -> None:
    """What a process that was stopped between two renames had set aside."""
    if aside.exists():
        if out.exists():
            shutil.rmtree(aside)
        else:
            os.rename(aside, out)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    names = (os.fsencode(one), os.fsencode(other))
    done: int = renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
    return done == 0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
