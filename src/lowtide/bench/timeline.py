"""A memory timeline: one training step on random token ids, its live bytes by kind and RssAnon.

The step is recorded by `memory.timeline.Ledger`, which slows it: its times are no measure of speed.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lowtide.memory.measure import MemoryMeter
from lowtide.memory.timeline import Ledger
from lowtide.methods import GradSink, Method, Step, get_method
from lowtide.model.adapter import Adapter
from lowtide.model.batch import Batch
from lowtide.model.decoder import Decoder
from lowtide.train.budget import within_budget
from lowtide.train.loop import Trainer
from lowtide.train.run import check_length, open_model
from lowtide.train.settings import check_step

from .step import (
    BenchStepSettings,
    described,
    located,
    nothing_said,
    random_batches,
    train_settings,
)


class _Sink:
    """Tells the ledger of each gradient, and passes it on."""

    def __init__(self, sink: GradSink, ledger: Ledger) -> None:
        self._sink, self._ledger = sink, ledger

    def add(self, name: str, grad: Tensor) -> None:
        self._ledger.is_gradient(grad)
        self._sink.add(name, grad)


class WatchedMethod:
    """A method whose gradients a ledger hears of."""

    def __init__(self, method: Method, ledger: Ledger) -> None:
        """Wrap `method`; everything is passed on to it."""
        self._method, self._ledger = method, ledger
        self.name, self.exact = method.name, method.exact

    def reserve(self, model: Decoder, max_tokens: int, max_length: int) -> None:
        """See `Method.reserve`."""
        self._method.reserve(model, max_tokens, max_length)

    def release(self) -> None:
        """See `Method.release`."""
        self._method.release()

    def step(
        self, model: Decoder, adapter: Adapter, batch: Batch, sink: GradSink, step: Step
    ) -> float:
        """See `Method.step`."""
        return self._method.step(model, adapter, batch, _Sink(sink, self._ledger), step)

    def loss(self, model: Decoder, adapter: Adapter | None, batch: Batch) -> float:
        """See `Method.loss`."""
        return self._method.loss(model, adapter, batch)


def timeline_step(
    settings: BenchStepSettings, say: Callable[[str], None] = nothing_said
) -> dict[str, Any]:
    """Record one training step on random token ids, after one that warms up.

    Args:
        settings: model, method, sizes; `steps` is not used.
        say: told of what takes long before the first step.

    Returns:
        `method`, `seq_len`, `kinds`, `samples` and `peak` as the results format has them, and
        beside them `libraries_bytes` (the constant part of `other`), `leaked` (bytes by kind that
        the step allocated and did not free), `metered_peak_bytes` (RssAnon's peak by the meter,
        which also sees what is freed within one operation), `n_moments` and the model's settings.

    Raises:
        ConfigError: an option does not belong to the method.
        ModelError: there is no such shape or model, or it is not supported.
        DataError: the sequence is longer than the model's positions.
    """
    check_step(settings)
    ledger = Ledger()
    with ledger:
        at = located(settings, say)
        model = open_model(at)
        check_length(model, settings.seq_len)
        ledger.watch(model)
        tokens = settings.batch_size * settings.seq_len
        lengths = (settings.seq_len,) * settings.batch_size
        settings, guard = within_budget(settings, model, lengths)
        _first_products(model, tokens)
        ledger.settle()
        adapter = Adapter.create(
            model, settings.lora_config(model.spec), settings.seed, settings.rounded_dtype
        )
        method = WatchedMethod(get_method(settings.method, settings), ledger)
        trainer = Trainer(model, adapter, method, train_settings(at), guard)
        trainer.reserve(lengths)
        warmup, recorded = islice(random_batches(model, settings), 2)
        trainer.update([warmup], 1)
        with MemoryMeter() as meter, ledger.recording():
            trainer.update([recorded], 2)
        metered = meter.take()
    return {
        **described(settings),
        **ledger.result(),
        "metered_peak_bytes": metered.anon_bytes - ledger.own_bytes,
    }


def _first_products(model: Decoder, tokens: int) -> None:
    """Products of the step's size, for the libraries to make the buffers that they keep.

    The operands lie in mappings of their own: from malloc's pages they would leave a heap behind
    that the step then fills, and so look like the libraries'.
    """
    spec, dtype = model.spec, model.compute_dtype
    width = min(512, spec.intermediate_size)
    sizes = (tokens * spec.hidden_size, width * spec.hidden_size, tokens * width)
    maps = [mmap.mmap(-1, n * dtype.itemsize, flags=_PRIVATE) for n in sizes]
    x, weight, y = (torch.frombuffer(m, dtype=dtype) for m in maps)
    x, weight, y = x.view(tokens, -1), weight.view(width, -1), y.view(tokens, -1)
    torch.mm(x, weight.t(), out=y)
    torch.mm(y, weight, out=x)
    torch.mm(y.t(), x, out=weight)


_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def describe(result: dict[str, Any]) -> str:
    """The peak of a timeline as a text table.

    Args:
        result: of `timeline_step`.

    Returns:
        Lines without an end of line after the last.
    """
    peak = result["peak"]
    rows = sorted(peak["bytes"].items(), key=lambda item: -item[1])
    rows = [(kind, size) for kind, size in rows if size]
    total, anon = peak["sum_bytes"], peak["rss_anon_bytes"]
    lines = [
        f"Peak of one step of {result['method']} at {result['seq_len']} tokens, "
        f"{peak['t_s']:.2f} s in: {peak['where']}",
        *(f"  {kind:<20}{size / 1e6:>10,.1f} MB{100 * size / total:>6.0f}%" for kind, size in rows),
        f"  {'sum':<20}{total / 1e6:>10,.1f} MB",
        f"  {'of it untouched':<20}{result['untouched_bytes'] / 1e6:>10,.1f} MB   (reserved, and "
        "not needed by this step)",
        f"  {'RssAnon':<20}{anon / 1e6:>10,.1f} MB   (above the import; other includes "
        f"{result['libraries_bytes'] / 1e6:,.1f} MB of libraries and Python objects)",
    ]
    return "\n".join(lines)
