"""The output directory: refused before training where it cannot serve, and held by one run."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lowtide.errors import OutputError
from lowtide.export.peft import CONFIG_FILE, WEIGHTS_FILE

from .checkpoints import FOLDER, Checkpoints
from .lock import locked

SETTINGS_FILE, METRICS_FILE, EVENTS_FILE = "run.yaml", "metrics.jsonl", "events.jsonl"
BEST_FOLDER = "best"
_RUN_FILES = (
    WEIGHTS_FILE,
    CONFIG_FILE,
    SETTINGS_FILE,
    METRICS_FILE,
    EVENTS_FILE,
    FOLDER,
    BEST_FOLDER,
)
REPORT_FILE, TENSORBOARD_FOLDER = "report.html", "tensorboard"
LEFT_BY_OTHERS = (REPORT_FILE, TENSORBOARD_FOLDER)
"""What else belongs to a run, and goes when it is replaced."""
HIDDEN = ".run-"
_SPARE_BYTES = 1 << 20


def check_output(directory: Path, replaced: bool) -> None:
    """Refuse a directory that holds a run or cannot be written. Nothing is made or changed.

    Args:
        directory: where the adapter will go.
        replaced: whether a run that it holds may be replaced, or is to go on.

    Raises:
        OutputError: says which.
    """
    if directory.exists() and not directory.is_dir():
        raise OutputError(f"--adapter-path {directory} is a file; name a directory.")
    if directory.is_symlink() and not directory.exists():
        raise OutputError(
            f"--adapter-path {directory} is a link to {os.readlink(directory)}, which does not "
            "exist. Make that directory, or choose another."
        )
    held = [name for name in _RUN_FILES if (directory / name).exists()]
    if held and not replaced:
        raise OutputError(
            f"--adapter-path {directory} already holds a run ({', '.join(held)}). Choose another "
            "directory, go on with it (--resume), or replace it (--overwrite)."
        )
    existing = _existing(directory)
    if not existing.is_dir():
        raise OutputError(
            f"--adapter-path {directory}: {existing} is a file, so no directory can be made in "
            "it. Choose another."
        )
    if os.statvfs(existing).f_flag & os.ST_RDONLY:
        raise unwritable(directory, OSError(errno.EROFS, os.strerror(errno.EROFS)))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(
            f"--adapter-path {directory}: {existing} cannot be written. Choose a directory that "
            "you own."
        )


def check_space(directory: Path, checkpoint_bytes: int, keep: int) -> None:
    """Refuse when the disk cannot take the checkpoints that are kept and the one being written.

    Args:
        directory: where they will go; it need not exist yet.
        checkpoint_bytes: of one of them.
        keep: how many are kept.

    Raises:
        OutputError: says what is free and what is needed.
    """
    needed = (keep + 1) * checkpoint_bytes + _SPARE_BYTES
    disk = shutil.disk_usage(_existing(directory))
    free = disk.free
    if free < needed and disk.total > 0:  # no total: not a disk, and writing will tell
        raise OutputError(
            f"the disk of {directory} has {free / 1e6:.1f} MB free, and {keep + 1} checkpoints of "
            f"{checkpoint_bytes / 1e6:.1f} MB need {needed / 1e6:.1f} MB. Free some space, choose "
            "another --adapter-path, or keep fewer (--keep-checkpoints)."
        )


def _existing(directory: Path) -> Path:
    """The directory itself or its nearest parent that exists."""
    path = directory.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


@contextmanager
def made_directory(directory: Path) -> Iterator[None]:
    """Make the output directory for the length of a run, and lock it.

    On leaving, the directories that were made and stayed empty are removed.

    Args:
        directory: made with its parents where they do not exist.

    Yields:
        Nothing.

    Raises:
        OutputError: the directory cannot be made or written, or another run uses it.
    """
    absent = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        with ExitStack() as stack:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(directory))
                _sweep(directory)
            except OSError as error:
                raise unwritable(directory, error) from error
            yield
    finally:
        with contextlib.suppress(OSError):  # the first that is not empty, or was not made
            for path in absent:
                path.rmdir()


def _sweep(directory: Path) -> None:
    """Remove what a run that was killed left behind; whoever holds the lock is the only one."""
    for path in directory.glob(f"{HIDDEN}*"):
        shutil.rmtree(path, ignore_errors=True)
    for name in _RUN_FILES:
        for path in (
            *directory.glob(f".{name}.*.tmp"),
            *directory.glob(f"{BEST_FOLDER}/.{name}.*"),
        ):
            path.unlink(missing_ok=True)
    Checkpoints(directory).sweep()


def unwritable(directory: Path, error: OSError) -> OutputError:
    """What to raise where the output directory refused to be written."""
    remedy = _REMEDIES.get(error.errno or 0, "Choose a directory on another disk.")
    return OutputError(f"--adapter-path {directory} cannot be written: {error.strerror}. {remedy}")


_GONE = "The directory or its disk is gone; see that it is there."
_REMEDIES = {
    errno.ENOSPC: "Free some space, or choose a directory on another disk.",
    errno.EDQUOT: "Free some space, or choose a directory on another disk.",
    errno.EACCES: "Choose a directory that you own.",
    errno.EPERM: "Choose a directory that you own.",
    errno.EROFS: "Its disk is mounted read-only: mount it for writing, or choose another.",
    **dict.fromkeys((errno.ENOENT, errno.ENODEV, errno.ESTALE, errno.EIO, errno.ENOTCONN), _GONE),
}
