"""Live bytes by kind over one step, beside RssAnon.

A `Ledger` looks at the result of every operation while it is entered: a storage that it has not
seen is entered with its size and its kind, and crossed out by a weak reference when it is freed,
also where only autograd's graph held it. The kind follows from who allocates: the frames of the
package on the stack, by the tables of `kinds`. A gradient that reaches the sink counts as one from
its birth. Views and mapped files are not counted. What was freed and malloc still holds, as glibc
tells it, is the kind `allocator`. Nothing is added to methods or operations,
and what does not enter a ledger pays nothing for it.

What the sum by kind cannot see, and why it differs from RssAnon:

- What the process holds that is no tensor: packing buffers, threads and kernels of the product
  libraries, the model's Python objects, modules imported since. `Ledger.settle` measures it before
  there is an adapter (a product of the step's size is made first), and `recording` adds what malloc
  has given out since to others than tensors; it is a constant part of `other`.
- Scratch that a kernel allocates and frees within one operation.
- Reserved pages that nothing has touched: tensors count in full, RssAnon counts touched pages.
  Those of tensors that outlive the recorded step are told beside the sum, as `untouched_bytes`.
- Where glibc cannot be asked, freed pages that malloc keeps.

Because malloc keeps freed pages, RssAnon stays near its peak when less is in use. So the peak is,
of all moments at which RssAnon is within 1% of its highest, that with the most in use.
"""

from __future__ import annotations

import ctypes
import sys
import time
import weakref
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowtide.weights.mapping import file_areas, untouched_bytes

from . import measure
from .kinds import KINDS, Stack, kind_of, where

MAX_SAMPLES = 600
_NEAR_PEAK = 0.99
_LOSS, _OTHER, _ALLOCATOR = (KINDS.index(kind) for kind in ("loss", "other", "allocator"))
_GRADIENTS, _INTERMEDIATES = KINDS.index("gradients"), KINDS.index("block intermediates")


class _MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`, see mallinfo(3)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    )  # fmt: skip


def _mallinfo() -> Any:
    """glibc's mallinfo2, or None where there is none."""
    try:
        found = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return None
    found.restype = _MallInfo
    return found


class _Noting(list[Any]):
    """A list that tells whose item was read last."""

    def __init__(self, items: list[Any], ledger: Ledger) -> None:
        super().__init__(items)
        self._ledger = ledger

    def __getitem__(self, index: Any) -> Any:
        self._ledger.note_block(index)
        return super().__getitem__(index)


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not type it
    """Enters every storage that is allocated while it is active; see the module's text.

    Enter it before model, adapter, method and trainer are made. Storages entered before
    `recording` are known; moments are kept only while recording.
    """

    def __init__(self) -> None:
        """Start with nothing known."""
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not type it
        self.own_bytes = 0
        self._stack = Stack()
        self._known: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._mapped: dict[int, weakref.ref[Any]] = {}
        self._sizes, self._kinds = array("q"), array("b")
        self._births, self._deaths = array("q"), array("q")
        self._times, self._anon, self._wheres = array("d"), array("q"), array("i")
        self._free, self._mallinfo = array("q"), _mallinfo()
        self._names: dict[str, int] = {}
        self._recording = self._changed = False
        self._start = 0.0
        self._constant = self._untouched = 0
        self._settled: int | None = None
        self._vocab_size = -1
        self._block: int | None = None
        self._graph_blocks: set[int] = set()
        self._went_back = False

    def watch(self, model: Any) -> None:
        """Learn the model's vocabulary, and hear which block's weights are in use.

        Args:
            model: a `Decoder`; its list of linears is replaced by one that tells of its use.
        """
        self._vocab_size = model.spec.vocab_size
        model.linears = _Noting(model.linears, self)

    def settle(self) -> int:
        """Take what the process holds now and is no tensor as the constant part of `other`.

        Returns:
            Its bytes, above RssAnon right after the import.
        """
        self._constant = max(0, self.anon() - self._held() - self._kept_by_malloc())
        self._settled = self._no_tensors()
        return self._constant

    def _held(self) -> int:
        """Bytes of the storages that live now."""
        return sum(self._sizes[entry] for entry, _ in self._known.values())

    def _no_tensors(self) -> int:
        """Bytes that malloc has given to others than storages, such as a library's kernels."""
        if self._mallinfo is None:
            return 0
        info = self._mallinfo()
        return int(info.uordblks + info.hblkhd) - self._held()

    def _kept_by_malloc(self) -> int:
        """Bytes that were freed and that malloc has not given back."""
        return 0 if self._mallinfo is None else int(self._mallinfo().fordblks)

    def note_block(self, block: int) -> None:
        """Block `block` is about to be used."""
        self._block = block
        if torch.is_grad_enabled():
            if self._went_back:
                self._graph_blocks.clear()
                self._went_back = False
            self._graph_blocks.add(block)

    def is_gradient(self, grad: Tensor) -> None:
        """Count this tensor's storage as gradients, from its birth."""
        known = self._known.get(grad.untyped_storage()._cdata)
        if known is not None:
            self._kinds[known[0]] = _GRADIENTS

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would import its compiler, 70 MB of it, to be kept out of `_look`."""
        return False

    def __enter__(self) -> Self:
        """Start looking; what the instrument itself takes is kept out of all figures."""
        super().__enter__()  # type: ignore[no-untyped-call]  # torch does not type it
        before = _anon()
        torch.empty(1)
        self.own_bytes += max(0, _anon() - before)
        return self

    def anon(self) -> int:
        """RssAnon now, above the import and without the instrument."""
        return _anon() - self.own_bytes

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep moments from here to the end of the context."""
        if self._settled is not None:
            self._constant += max(0, self._no_tensors() - self._settled)
        self._start = time.perf_counter()
        self._recording = self._changed = True
        self._moment()
        try:
            yield
        finally:
            self._changed = True
            self._moment()
            self._recording = False
            storages = [ref() for _, ref in self._known.values()]
            self._untouched = sum(untouched_bytes(s.data_ptr(), s.nbytes()) for s in storages if s)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation, then look at what it returned."""
        out = func(*args, **(kwargs or {}))
        self._went_back |= torch._C._current_graph_task_id() != -1
        if isinstance(out, Tensor):
            self._look(out, func)
        else:
            for value in tree_leaves(out):
                if isinstance(value, Tensor):
                    self._look(value, func)
        if self._recording:
            self._moment()
        return out

    def _look(self, tensor: Tensor, func: Any) -> None:
        """Enter the storage of an operation's result if it is new, private memory."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._known or address in self._mapped or storage.nbytes() == 0:
            return
        if _is_mapped(storage, func):
            forget = self._mapped
            forget[address] = weakref.ref(storage, lambda _: forget.pop(address, None))
            return
        kind = KINDS.index(kind_of(self._stack.places(sys._getframe(1))))
        if kind == _INTERMEDIATES and self._vocab_size in tensor.shape:
            kind = _LOSS  # autograd's backward of the logits, which no frame tells apart
        entry = len(self._sizes)
        self._sizes.append(storage.nbytes())
        self._kinds.append(kind)
        self._births.append(len(self._times))
        self._deaths.append(-1)
        self._changed = True
        self._known[address] = (
            entry,
            weakref.ref(storage, lambda _: self._freed(address, entry)),
        )

    def _freed(self, address: int, entry: int) -> None:
        self._known.pop(address, None)
        self._deaths[entry] = len(self._times)
        self._changed = True

    def _moment(self) -> None:
        """Keep this moment, if anything has changed since the last."""
        anon = self.anon()
        if not self._changed and anon == self._anon[-1]:
            return
        node = None
        block = self._block
        if torch._C._current_graph_task_id() != -1:
            block = next(iter(self._graph_blocks)) if len(self._graph_blocks) == 1 else None
            current = torch._C._current_autograd_node()
            node = "autograd" if current is None else str(current.name())
        name = where(self._stack.places(sys._getframe(2)), block, node)
        self._times.append(time.perf_counter() - self._start)
        self._anon.append(anon)
        self._free.append(self._kept_by_malloc())
        self._wheres.append(self._names.setdefault(name, len(self._names)))
        self._changed = False

    def result(self) -> dict[str, Any]:
        """What was recorded.

        Returns:
            `kinds`, `samples`, `peak`, `libraries_bytes` (the constant part of `other`),
            `untouched_bytes`, `leaked` (bytes by kind that the recorded step allocated and did not
            free), and `n_moments`.
        """
        live = list(self._live())
        sums = [sum(row) for row in live]
        used = [total - row[_ALLOCATOR] for total, row in zip(sums, live, strict=True)]
        names = list(self._names)
        peak = _peak_place(self._anon, used)

        def sample(place: int) -> dict[str, Any]:
            by_kind = dict(zip(KINDS, live[place], strict=True))
            return {
                "t_s": self._times[place],
                "rss_anon_bytes": self._anon[place],
                "bytes": by_kind,
            }

        first, last = live[0], live[-1]
        return {
            "kinds": list(KINDS),
            "samples": [sample(place) for place in _chosen(self._anon, used, peak)],
            "peak": {
                **sample(peak),
                "where": names[self._wheres[peak]],
                "sum_bytes": sums[peak],
            },
            "libraries_bytes": self._constant,
            "untouched_bytes": self._untouched,
            "leaked": {
                kind: after - before
                for kind, before, after in zip(KINDS, first, last, strict=True)
                if after != before and kind != "allocator"
            },
            "n_moments": len(sums),
        }

    def _live(self) -> Iterator[list[int]]:
        """Bytes by kind at each moment."""
        changes: dict[int, list[tuple[int, int]]] = {}
        for kind, size, birth, death in zip(
            self._kinds, self._sizes, self._births, self._deaths, strict=True
        ):
            changes.setdefault(birth, []).append((kind, size))
            if death >= 0:
                changes.setdefault(death, []).append((kind, -size))
        now = [0] * len(KINDS)
        now[_OTHER] = self._constant
        for place in range(len(self._times)):
            for kind, size in changes.get(place, ()):
                now[kind] += size
            now[_ALLOCATOR] = self._free[place]
            yield list(now)


def _anon() -> int:
    """RssAnon now, above what it was right after the import."""
    return measure.read_memory().anon_bytes - measure.AT_IMPORT.anon_bytes


def _is_mapped(storage: Any, func: Any) -> bool:
    """Whether a storage met for the first time is a mapped file.

    An operation that allocates its result has no alias of an argument in its schema; only the
    others can bring memory that came from elsewhere.
    """
    if func is torch.ops.aten.from_file.default:
        return True
    if all(value.alias_info is None for value in func._schema.returns):
        return False
    address = storage.data_ptr()
    return any(area.start <= address < area.stop for area in file_areas())


def _peak_place(anon: Sequence[int], used: Sequence[int]) -> int:
    """Of the moments with RssAnon within 1% of its highest, the first with the most in use."""
    floor = _NEAR_PEAK * max(anon)
    near = [place for place, value in enumerate(anon) if value >= floor]
    return max(near, key=lambda place: used[place])


def _chosen(anon: Sequence[int], used: Sequence[int], peak: int) -> list[int]:
    """At most MAX_SAMPLES moments: the ends, the peak, each stretch's first and its highest."""
    count = len(used)
    if count <= MAX_SAMPLES:
        return list(range(count))
    chosen = {0, peak, count - 1}
    stretches = MAX_SAMPLES // 3 - 1
    for number in range(stretches):
        start, stop = number * count // stretches, (number + 1) * count // stretches
        span = range(start, stop)
        chosen |= {start, max(span, key=anon.__getitem__), max(span, key=used.__getitem__)}
    return sorted(chosen)
