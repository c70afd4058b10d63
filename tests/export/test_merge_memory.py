"""Merging holds some rows at a time, whatever the model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import small
import torch
from merging import write_adapter
from torch import Tensor

import lowtide as lt
from lowtide.export import merged as merged_module
from lowtide.export import model_directory
from lowtide.export.merge import merge

FILE = "model.safetensors"


def test_no_tensor_is_larger_than_a_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    model = small.write_small_model(tmp_path / "model")
    adapter = write_adapter(model, tmp_path / "adapter", use_dora=True)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's own
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            storages = [a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)]
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in storages:
                largest = max(largest, out.numel())
            return out

    monkeypatch.setattr(merged_module, "_TILE_ELEMENTS", 512)
    write = model_directory.ModelWriter.write

    def watched(self: model_directory.ModelWriter, directory: Path) -> None:
        with Watch():
            write(self, directory)

    monkeypatch.setattr(model_directory.ModelWriter, "write", watched)
    merge(model, adapter, tmp_path / "out")
    shapes = lt.load_model(model).spec.tensor_shapes().values()
    assert max(torch.Size(shape).numel() for shape in shapes) > 8000
    assert 0 < largest <= 512


MEASURED = """
import sys, lowtide
from lowtide.export.merge import merge
from lowtide.memory.measure import MemoryMeter
from lowtide.model.threads import set_threads
import torch; torch.set_num_threads(1)
with MemoryMeter() as meter:
    before = meter.take()
    merge(*sys.argv[1:])
    peak = meter.take()
print(peak.anon_bytes, peak.rss_bytes - before.rss_bytes)
"""


def test_memory_stays_bounded(tmp_path: Path) -> None:
    """A model of 300 MB and an adapter of 10: some tiles, one tensor's pages, one A and B."""
    model = small.write_small_model(
        tmp_path / "model", vocab_size=90_000, hidden_size=512, intermediate_size=4096,
        num_hidden_layers=4,
    )  # fmt: skip
    adapter = write_adapter(model, tmp_path / "adapter", r=32)
    child = subprocess.run(
        [sys.executable, "-c", MEASURED, model, adapter, tmp_path / "out"],
        capture_output=True, text=True, check=True, env=small.environment(),
    )  # fmt: skip
    anon, resident = map(int, child.stdout.split())
    embedding = 4 * 90_000 * 512
    assert (model / FILE).stat().st_size > 290e6
    assert anon < 30e6
    assert resident < anon + embedding + 40e6
