"""The models that a server offers: the base, and adapters that are read again when they change."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowtide.errors import AdapterError, ConfigError, LowtideError, shown
from lowtide.export.peft import CONFIG_FILE, WEIGHTS_FILE
from lowtide.model.adapter import Adapter
from lowtide.model.decoder import Decoder

from .faults import Fault

BASE = "base"
MOST_ADAPTERS = 16
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TRIES = 3


def named_paths(texts: Sequence[str]) -> dict[str, Path]:
    """Adapter directories by name.

    Args:
        texts: `PATH`, whose last part is the name, or `NAME=PATH`.

    Returns:
        Paths in the order given.

    Raises:
        ConfigError: a name is given twice, or cannot be one.
    """
    paths: dict[str, Path] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        whole = Path(text).expanduser()
        if not equals or whole.exists():
            name, path = whole.absolute().name, whole
        else:
            path = Path(rest).expanduser()
        if problem := _unfit(name, paths):
            raise ConfigError(f"--adapter-path {text}: {problem} Give NAME=PATH.")
        paths[name] = path
    if len(paths) > MOST_ADAPTERS:
        raise ConfigError(f"{len(paths)} adapters are given; at most {MOST_ADAPTERS} are served.")
    return paths


def _unfit(name: str, taken: Any) -> str | None:
    if not _NAME.fullmatch(name):
        return (
            f"{name!r} cannot be a model's name; expected up to 64 letters, digits, '.', '_' or "
            "'-', the first a letter or digit."
        )
    if name in taken or name == BASE:
        return f"the name {name!r} is taken."
    return None


@dataclass
class _Served:
    """An adapter as it was last read."""

    path: Path
    adapter: Adapter
    stamp: tuple[tuple[int, ...], ...]
    checksum: str
    changed: float


class Catalogue:
    """Models by the names that requests use; safe to use from several threads."""

    def __init__(
        self,
        model: Decoder,
        paths: dict[str, Path],
        say: Callable[[str], None],
        root: Path | None = None,
    ) -> None:
        """Read every adapter.

        Args:
            model: the base.
            paths: adapter directories by name.
            say: told when an adapter is read again, or cannot be.
            root: where adapters may be loaded from at run time; None allows none.

        Raises:
            AdapterError: an adapter cannot be used.
            ConfigError: an adapter has the model's name.
        """
        self._model, self._say, self._root = model, say, root
        self._lock = threading.Lock()
        self._started = time.time()
        self.base_name = model.path.absolute().name or BASE
        self._served: dict[str, _Served] = {}
        for name, path in paths.items():
            if name == self.base_name:
                raise ConfigError(
                    f"--adapter-path {path}: {name!r} is the base model's name. Give NAME=PATH."
                )
            self._served[name] = self._read(path)
        self._told: dict[str, str] = {}

    @property
    def names(self) -> list[str]:
        """The base's name, then the adapters'."""
        with self._lock:
            return [self.base_name, *self._served]

    @property
    def adapters(self) -> list[Adapter]:
        """Every adapter in use."""
        with self._lock:
            return [one.adapter for one in self._served.values()]

    def check(self, name: str) -> None:
        """Refuse a name that there is not.

        Args:
            name: of the base model, or an adapter.

        Raises:
            Fault: lists the names that there are.
        """
        if name != BASE and name not in self.names:
            raise self._unknown(name)

    def _unknown(self, name: str) -> Fault:
        return Fault(
            404, f"there is no model {shown(name)}; there are: {', '.join(self.names)}.",
            param="model", code="model_not_found",
        )  # fmt: skip

    def get(self, name: str) -> tuple[Adapter | None, str]:
        """The adapter of a name, read again if its files have changed.

        Args:
            name: of the base model, or an adapter.

        Returns:
            The adapter, None for the base; and what names this very state of it.

        Raises:
            Fault: there is no such model.
        """
        if name in (BASE, self.base_name):
            return None, "base"
        with self._lock:
            served = self._served.get(name)
        if served is None:
            raise self._unknown(name)
        fresh = self._fresh(name, served)  # not under the lock: files may be slow to read
        with self._lock:
            if self._served.get(name) is served:
                self._served[name] = fresh
        return fresh.adapter, fresh.checksum

    def _fresh(self, name: str, served: _Served) -> _Served:
        """The newest state that can be read; a run may be writing, or be gone."""
        try:
            if _stamp(served.path) == served.stamp:
                return served
            fresh = self._read(served.path)
        except (LowtideError, OSError) as error:
            if self._told.get(name) != str(error):
                self._told[name] = str(error)
                self._say(f"adapter {name} stays as it was: {error}")
            return served
        self._told.pop(name, None)
        if fresh.checksum == served.checksum:
            fresh.adapter = served.adapter  # the same values: what was read with it stays valid
        else:
            self._say(f"adapter {name} was read again from {served.path}")
        return fresh

    def _read(self, path: Path) -> _Served:
        """An adapter and the state of its files, which did not change while they were read."""
        for _ in range(_TRIES):
            files = [path / CONFIG_FILE, path / WEIGHTS_FILE]
            if not all(file.is_file() for file in files):
                Adapter.load(path, self._model)  # says what is missing
            before = _stamp(path)
            adapter = Adapter.load(path, self._model)
            checksum = hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()
            if _stamp(path) == before:
                changed = (path / WEIGHTS_FILE).stat().st_mtime
                return _Served(path, adapter, before, checksum[:12], changed)
        raise AdapterError(f"the files of {path} change all the time; try again when they do not.")

    def load(self, name: str, path: str) -> None:
        """Offer one more adapter.

        Args:
            name: what requests will call it.
            path: its directory, below the root.

        Raises:
            Fault: it is not allowed, or cannot be used.
        """
        if self._root is None:
            raise Fault(
                403, "adapters are loaded at run time only from below a directory that the server "
                "was started with: --adapter-root DIR.",
            )  # fmt: skip
        root = self._root.resolve()
        try:
            directory = (root / path).resolve()
        except (OSError, ValueError, RuntimeError):  # a NUL, a loop of links
            directory = root
        if root not in directory.parents:
            raise Fault(403, f"lora_path is not below --adapter-root {root}.", param="lora_path")
        self._check_room(name)
        try:
            served = self._read(directory)
        except AdapterError as error:
            raise Fault(400, str(error), param="lora_path") from None
        with self._lock:
            self._check_room(name)
            self._served[name] = served

    def _check_room(self, name: str) -> None:
        if problem := _unfit(name, [self.base_name, *self._served]):
            raise Fault(400, f"lora_name: {problem}", param="lora_name")
        if len(self._served) >= MOST_ADAPTERS:
            raise Fault(400, f"{MOST_ADAPTERS} adapters are served already; unload one first.")

    def unload(self, name: str) -> None:
        """Offer an adapter no longer.

        Args:
            name: what requests call it.

        Raises:
            Fault: there is none of that name.
        """
        self.check(name)
        with self._lock:
            if self._served.pop(name, None) is None:
                raise Fault(400, f"{name!r} is the base model, which stays.", param="lora_name")

    def listing(self) -> list[dict[str, Any]]:
        """The models as GET /v1/models lists them."""
        base = self.base_name
        with self._lock:
            adapters = [(name, int(one.changed)) for name, one in self._served.items()]
        entries: list[dict[str, Any]] = [
            {"id": base, "object": "model", "created": int(self._started), "owned_by": "lowtide"}
        ]
        for name, changed in adapters:
            entries.append(
                {"id": name, "object": "model", "created": changed, "owned_by": "lowtide",
                 "parent": base}
            )  # fmt: skip
        return entries


def _stamp(path: Path) -> tuple[tuple[int, ...], ...]:
    """What changes whenever one of the two files does."""
    states = [(path / name).stat() for name in (CONFIG_FILE, WEIGHTS_FILE)]
    return tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in states)
