"""Blocks of GGUF files against the `gguf` package, to the bit, over any bytes and in any tile."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_storages import tensors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowtide.weights.matrix import ReorderedMatrix
from lowtide.weights.storages import BLOCKS
from lowtide.weights.storages.base import QuantizedMatrix

# Blocks in a row, and rows.
SHAPES = [(1, 1), (3, 7), (5, 33), (2, 150)]


def random_bytes(name: str, rows: int, blocks: int) -> NDArray[np.uint8]:
    """Every byte may be anything: scales too small to be normal, infinite, not numbers."""
    generator = np.random.default_rng(rows * 1000 + blocks)
    return generator.integers(0, 256, (rows, blocks * BLOCKS[name].nbytes), dtype=np.uint8)


def reference(name: str, raw: NDArray[np.uint8]) -> Tensor:
    with np.errstate(all="ignore"):
        kind = gguf.GGMLQuantizationType[name]
        return torch.from_numpy(gguf.quants.dequantize(raw, kind).astype(np.float32))


def matrix(name: str, raw: NDArray[np.uint8], dtype: torch.dtype) -> QuantizedMatrix:
    storage = BLOCKS[name]
    shape = (raw.shape[0], raw.shape[1] // storage.nbytes * storage.size)
    return QuantizedMatrix(storage, {"blocks": torch.from_numpy(raw)}, shape, dtype)


def same_bits(ours: Tensor, truth: Tensor) -> bool:
    """Signs of zeros too; any NaN is a NaN."""
    truth = truth.to(ours.dtype)
    kind = torch.int64 if ours.dtype == torch.float64 else torch.int32
    equal = ours.contiguous().view(kind) == truth.contiguous().view(kind)
    return bool((equal | (ours.isnan() & truth.isnan())).all())


@pytest.mark.parametrize("name", BLOCKS)
def test_sizes_and_numbers_are_the_packages(name: str) -> None:
    storage, kind = BLOCKS[name], gguf.GGMLQuantizationType[name]
    assert storage.name == name
    assert storage.number == kind.value
    assert (storage.size, storage.nbytes) == gguf.GGML_QUANT_SIZES[kind]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BLOCKS)
def test_any_tile_of_any_bytes_is_the_packages_to_the_bit(name: str, dtype: torch.dtype) -> None:
    """In float64 too: a weight is what float32 holds."""
    generator = torch.Generator().manual_seed(0)
    for blocks, rows in SHAPES:
        raw = random_bytes(name, rows, blocks)
        truth, w = reference(name, raw), matrix(name, raw, dtype)
        cols = truth.shape[1]
        assert w.shape == truth.shape
        assert w.whole().dtype == dtype
        assert same_bits(w.whole(), truth)
        buffer = torch.empty(rows * cols + 3, dtype=dtype)
        edges = [(0, cols), (0, 1), (cols - 1, cols), (cols // 2, cols), (5, min(cols, 300))]
        drawn = torch.randint(cols + 1, (40, 2), generator=generator).sort(1).values.tolist()
        for left, right in [*edges, *drawn]:
            if left < right:
                buffer.fill_(torch.nan)
                tile = w.cols(left, right, buffer)
                assert same_bits(tile, truth[:, left:right]), (left, right)
                start, stop = left * rows // cols, -(-right * rows // cols)
                assert same_bits(w.rows(start, stop, buffer), truth[start:stop])
        indices = torch.randint(rows, (300,), generator=generator)
        taken = torch.full((300, cols), torch.nan, dtype=dtype)
        w.take(indices, taken)
        assert same_bits(taken, truth[indices])


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_what_the_package_quantised_is_near_what_it_was(name: str) -> None:
    """Half a step, or one where a level is missing on one side: of the numbers, not of bytes."""
    values = np.random.default_rng(1).standard_normal((64, 320)).astype(np.float32) * 0.02
    raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name])
    ours = matrix(name, raw, torch.float32).whole()
    assert same_bits(ours, reference(name, raw))
    levels = {"Q8_0": 127, "Q4_0": 8, "Q4_1": 15, "Q5_0": 16, "Q5_1": 31}[name]
    groups = torch.from_numpy(values).view(64, 10, 32)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    step = ((high - low) if name.endswith("_1") else torch.maximum(-low, high)) / levels
    # Scales are rounded to float16, 11 bits, and so is a minimum.
    error = (ours.view(64, 10, 32) - groups).abs()
    assert bool((error <= step + (levels + 1) * step * 2**-11 + low.abs() * 2**-11).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reordered_rows_in_any_tile(dtype: torch.dtype) -> None:
    raw = random_bytes("Q4_K", 24, 2)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    inner = matrix("Q4_K", raw, dtype)
    ours, truth = ReorderedMatrix(inner, order), reference("Q4_K", raw)[order]
    buffer = torch.empty(24 * 512, dtype=dtype)
    assert (ours.shape, ours.widens, ours.storage) == ((24, 512), True, inner.storage)
    assert same_bits(ours.whole(), truth)
    for start, stop in ((0, 24), (3, 4), (7, 20)):
        assert same_bits(ours.rows(start, stop, buffer), truth[start:stop])
        assert same_bits(ours.cols(start * 20, stop * 20, buffer), truth[:, start * 20 : stop * 20])
    indices = torch.tensor([5, 5, 0, 23])
    taken = torch.empty(4, 512, dtype=dtype)
    ours.take(indices, taken)
    assert same_bits(taken, truth[indices])


class Made(TorchDispatchMode):
    """Sizes of what operations allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's own
        given = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        storages = [t.untyped_storage() for t in tensors(out)]
        self.sizes += [one.nbytes() for one in storages if one.data_ptr() not in given]
        return out


@pytest.mark.parametrize("itemsize", [4, 8])
@pytest.mark.parametrize("name", BLOCKS)
def test_unpacking_takes_what_is_planned(name: str, itemsize: int) -> None:
    rows, cols = 64, 1024
    dtype = torch.float32 if itemsize == 4 else torch.float64
    raw = random_bytes(name, rows, cols // BLOCKS[name].size)
    w, buffer = matrix(name, raw, dtype), torch.empty(rows * cols, dtype=dtype)
    for span in ((0, cols), (100, 612), (256, 768), (300, 400)):
        with Made() as made:
            w.cols(*span, buffer)
        counted = BLOCKS[name].scratch_bytes(rows, span, cols, itemsize)
        assert max(made.sizes) <= counted <= sum(made.sizes), span
    if itemsize == 4:  # half of the tile at most, where no block is cut
        assert BLOCKS[name].scratch_bytes(rows, (0, cols), cols, 4) <= rows * cols * 4 // 2
