"""A disk that records what is done to a directory, fills up, or loses what was not flushed.

POSIX promises little about what a power cut leaves: of a file, what was flushed by fsync; of a
directory, the entries that were made before it was flushed. Anything later may be there or not, in
any combination. `Disk.crashes` makes those states.
"""

from __future__ import annotations

import builtins
import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

_ALL_SUBSETS = 5
"""Up to so many entries that may be lost, every combination is tried."""


@dataclass(eq=False)
class Node:
    """A file or a directory, whatever its names are."""

    path: Path
    directory: bool
    content: bytes = b""
    """Of a file, as a reader sees it."""


@dataclass
class Operation:
    """What one call did: directory entries set or removed, or something flushed."""

    entries: list[tuple[Node, str, Node | None]] = field(default_factory=list)
    flushed: Node | None = None
    contents: dict[Node, bytes] = field(default_factory=dict)
    """Of all files that were written to and not flushed, after the call; or of the flushed one."""


@dataclass(frozen=True)
class Crash:
    """What a power cut after `operations` calls may leave: content by path, None a directory."""

    operations: int
    tree: dict[str, bytes | None]

    def write(self, root: Path) -> Path:
        """Make it a directory."""
        for name, content in sorted(self.tree.items()):
            if content is None:
                (root / name).mkdir(parents=True)
            else:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(content)
        return root


class Disk:
    """Stands between the program and one directory."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch, full_at: int | None = None) -> None:
        """Watch every call from now on.

        Args:
            root: an empty directory.
            patch: puts the calls back.
            full_at: the call, from 1, from which on nothing new fits on the disk.
        """
        self.root = root
        self.calls = 0
        self.operations: list[Operation] = []
        self._full_at = full_at
        self._nodes = {root: Node(root, directory=True)}
        self._dirty: set[Node] = set()
        self._open = builtins.open
        patch.setattr(builtins, "open", self._opened)
        self._wrap(patch, "fsync", self._fsync)
        self._wrap(patch, "mkdir", self._mkdir)
        self._wrap(patch, "link", self._link)
        for name in ("rename", "replace"):
            self._wrap(patch, name, self._rename)
        for name in ("unlink", "remove", "rmdir"):
            self._wrap(patch, name, self._unlink)

    def _wrap(self, patch: pytest.MonkeyPatch, name: str, ours: Callable[..., Any]) -> None:
        real = getattr(os, name)
        patch.setattr(os, name, lambda *given, **more: ours(real, *given, **more))

    def needs_room(self) -> None:
        """A call that takes space, or flushes what took some."""
        self.calls += 1
        if self._full_at is not None and self.calls >= self._full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _known(self, path: object, dir_fd: int | None = None) -> Path | None:
        place = Path(os.fspath(path))  # type: ignore[call-overload]
        if dir_fd is not None:
            place = Path(os.readlink(f"/proc/self/fd/{dir_fd}")) / place
        place = Path(os.path.abspath(place))
        return place if self.root in (place, *place.parents) else None

    def _add(self, operation: Operation) -> None:
        for node in self._dirty:
            if node.path.exists():
                node.content = node.path.read_bytes()
        operation.contents |= {node: node.content for node in self._dirty}
        self.operations.append(operation)

    def _entry(self, path: Path, node: Node | None) -> tuple[Node, str, Node | None]:
        if node is None:
            del self._nodes[path]
        else:
            self._nodes[path] = node
            node.path = path
        return self._nodes[path.parent], path.name, node

    def _opened(self, path: Any, mode: str = "r", *given: Any, **more: Any) -> Any:
        known = self._known(path) if isinstance(path, str | os.PathLike) else None
        if known is None or not set(mode) & set("wax+"):
            return self._open(path, mode, *given, **more)
        self.needs_room()
        file = self._open(path, mode, *given, **more)
        if known not in self._nodes:
            node = Node(known, directory=False)
            self._dirty.add(node)
            self._add(Operation([self._entry(known, node)]))
        self._dirty.add(self._nodes[known])
        return _File(file, self)

    def _fsync(self, real: Callable[..., Any], descriptor: int) -> None:
        known = self._known(os.readlink(f"/proc/self/fd/{descriptor}"))
        if known is None:
            return real(descriptor)
        self.needs_room()
        node = self._nodes[known]
        self._dirty.discard(node)
        if not node.directory:
            node.content = known.read_bytes()
        self._add(Operation(flushed=node, contents={node: node.content}))
        return None

    def _mkdir(self, real: Callable[..., Any], path: Any, *given: Any, **more: Any) -> None:
        known = self._known(path)
        if known is not None:
            self.needs_room()
        real(path, *given, **more)
        if known is not None:
            self._add(Operation([self._entry(known, Node(known, directory=True))]))

    def _link(self, real: Callable[..., Any], source: Any, path: Any) -> None:
        known, old = self._known(path), self._known(source)
        assert known is not None
        assert old is not None
        self.needs_room()
        real(source, path)
        self._add(Operation([self._entry(known, self._nodes[old])]))

    def _rename(self, real: Callable[..., Any], source: Any, path: Any) -> None:
        known, old = self._known(path), self._known(source)
        real(source, path)
        if known is None or old is None:
            return
        node = self._nodes[old]
        entries = [self._entry(old, None), self._entry(known, node)]
        for place, one in list(self._nodes.items()):
            if old in place.parents:
                del self._nodes[place]
                one.path = known / place.relative_to(old)
                self._nodes[one.path] = one
        self._add(Operation(entries))

    def _unlink(self, real: Callable[..., Any], path: Any, *, dir_fd: int | None = None) -> None:
        known = self._known(path, dir_fd)
        real(path, dir_fd=dir_fd)
        if known is not None and known in self._nodes:
            self._dirty.discard(self._nodes[known])
            self._add(Operation([self._entry(known, None)]))

    def crashes(self) -> Iterator[Crash]:
        """Every state that a power cut after any of the calls may leave."""
        for count in range(len(self.operations) + 1):
            done = self.operations[:count]
            lasting, pending = _sorted_out(done)
            for kept in _subsets(pending):
                for share in (0.0, 0.5, 1.0):
                    yield Crash(count, self._tree(done, sorted([*lasting, *kept]), share))

    def _tree(
        self, done: list[Operation], kept: list[int], share: float
    ) -> dict[str, bytes | None]:
        root = self._nodes[self.root]
        entries: dict[Node, dict[str, Node]] = {}
        for number in kept:
            for directory, name, node in done[number].entries:
                if node is None:
                    entries.get(directory, {}).pop(name, None)
                else:
                    entries.setdefault(directory, {})[name] = node
        flushed: dict[Node, bytes] = {}
        latest: dict[Node, bytes] = {}
        for operation in done:
            latest |= operation.contents
            if operation.flushed is not None:
                flushed |= {operation.flushed: operation.contents[operation.flushed]}
        tree: dict[str, bytes | None] = {}

        def walk(directory: Node, prefix: str) -> None:
            for name, node in entries.get(directory, {}).items():
                if node.directory:
                    tree[prefix + name] = None
                    walk(node, f"{prefix}{name}/")
                else:
                    safe, seen = flushed.get(node, b""), latest.get(node, b"")
                    tree[prefix + name] = seen[: len(safe) + int(share * (len(seen) - len(safe)))]

        walk(root, "")
        return tree


def _sorted_out(done: list[Operation]) -> tuple[list[int], list[int]]:
    """Calls whose entries are on the disk for sure, and those whose entries may be lost."""
    lasting, pending = [], []
    flushed: set[Node] = set()
    for number in range(len(done) - 1, -1, -1):
        operation = done[number]
        if operation.flushed is not None:
            flushed.add(operation.flushed)
        elif any(directory in flushed for directory, _, _ in operation.entries):
            lasting.append(number)
        else:
            pending.append(number)
    return lasting, pending[::-1]


def _subsets(pending: list[int]) -> Iterator[tuple[int, ...]]:
    """All of them where they are few; else beginnings, and all but one or only one."""
    if len(pending) <= _ALL_SUBSETS:
        for size in range(len(pending) + 1):
            yield from combinations(pending, size)
        return
    for number, one in enumerate(pending):
        yield tuple(pending[:number])
        yield tuple(other for other in pending if other != one)
        yield (one,)
    yield tuple(pending)


class _File:
    """An open file on a disk that may be full: what does not fit is written in part."""

    def __init__(self, file: Any, disk: Disk) -> None:
        self._file, self._disk = file, disk

    def write(self, data: Any) -> int:
        try:
            self._disk.needs_room()
        except OSError:
            self._file.write(data[: len(data) // 2])
            raise
        return int(self._file.write(data))

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
