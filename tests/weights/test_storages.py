"""Each storage against its formula, written again in numpy; tiles against the whole matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import randn
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowtide.weights.storages import STORAGES
from lowtide.weights.storages.base import QuantizedMatrix

Array = NDArray[np.float32]
# Rows and columns that fill no group, one group, an odd number of them, and a last one in part.
SHAPES = [(7, 45), (3, 31), (33, 64), (5, 96), (64, 200), (1, 1)]
SCALE_ROUNDING = 2.0**-8 / (1 - 2.0**-8)
"""By how much a scale may be too small: it has 8 significant bits."""
# In steps. What lies beyond the last level is cut off: 127 SCALE_ROUNDING of int8, less than the
# half step of rounding; 8 + 8 SCALE_ROUNDING down to 7 on the side of a symmetric group that has
# no level 8; and beside the rounding of its zero point, 15 SCALE_ROUNDING of an asymmetric one.
LARGEST_ERROR = {
    "int8": 0.5,
    "int4": 1 + 8 * SCALE_ROUNDING,
    "int4-g64": 1 + 8 * SCALE_ROUNDING,
    "int4-asym": 0.5 + 15 * SCALE_ROUNDING,
    "int4-asym-g64": 0.5 + 15 * SCALE_ROUNDING,
}
DIVISION_ROUNDING = 127 * 2.0**-23


def bfloat16(x: Array) -> Array:
    """Round to nearest, ties to even, by the bits."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32)


def reference(name: str, w: Array) -> tuple[Array, Array]:
    """The dequantised matrix and the scale of each weight, group by group."""
    size = {"int8": w.shape[1], "int4": 32, "int4-asym": 32}.get(name, 64)
    out, scales = np.zeros_like(w), np.zeros_like(w)
    for row in range(w.shape[0]):
        for start in range(0, w.shape[1], size):
            group = w[row, start : start + size]
            out[row, start : start + size], scale = quantized_group(name, group)
            scales[row, start : start + size] = scale
    return out, scales


def quantized_group(name: str, w: Array) -> tuple[Array, np.float32]:
    """One group by the formulas in the storages' docstrings."""
    if not w.any():
        return w, np.float32(0)
    if name == "int8":
        scale = bfloat16(np.abs(w).max() / np.float32(127))
        return np.clip(np.rint(w / scale), -127, 127) * scale, scale
    if "asym" not in name:
        scale = bfloat16(w[np.abs(w).argmax()] / np.float32(-8))
        return np.clip(np.rint(w / scale), -8, 7) * scale, scale
    low, high = min(w.min(), np.float32(0)), max(w.max(), np.float32(0))
    scale = bfloat16((high - low) / np.float32(15))
    zero = np.clip(np.rint(-low / scale), 0, 15)
    return (np.clip(np.rint(w / scale) + zero, 0, 15) - zero) * scale, scale


def matrix(name: str, w: Tensor, dtype: torch.dtype = torch.float32) -> QuantizedMatrix:
    storage = STORAGES[name]
    return QuantizedMatrix(storage, storage.encode(w), (w.shape[0], w.shape[1]), dtype)


def weights(rows: int, cols: int) -> Tensor:
    """Rows of very different sizes, one of zeros, one without a negative, one of a single value."""
    w = randn(rows, cols, dtype=torch.float32) * 0.02
    w *= 10.0 ** torch.linspace(-6, 3, rows).unsqueeze(1)
    for row, change in enumerate((torch.zeros_like, torch.abs, torch.ones_like)):
        if rows > 3:
            w[row] = change(w[row])
    return w


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", STORAGES)
def test_the_dequantised_matrix_is_the_formulas(name: str, shape: tuple[int, int]) -> None:
    w = weights(*shape)
    truth, scales = reference(name, w.numpy())
    ours = matrix(name, w).whole()
    assert ours.equal(torch.from_numpy(truth))
    steps = (ours - w).abs() / torch.from_numpy(scales).abs().clamp_min(1e-30)
    assert float(steps.max()) <= LARGEST_ERROR[name] + DIVISION_ROUNDING


@pytest.mark.parametrize("name", STORAGES)
def test_the_parts_are_those_that_are_declared(name: str) -> None:
    for shape in SHAPES:
        parts = STORAGES[name].encode(weights(*shape))
        found = {part: (t.dtype, tuple(t.shape)) for part, t in parts.items()}
        assert found == STORAGES[name].entries(shape)
        assert all(entry[1][0] == shape[0] for entry in found.values())


def test_bytes_per_weight() -> None:
    sizes = {
        name: sum(
            dtype.itemsize * torch.Size(shape).numel()
            for dtype, shape in storage.entries((256, 1024)).values()
        )
        / (256 * 1024)
        for name, storage in STORAGES.items()
    }
    bits = {name: 8 * size for name, size in sizes.items()}
    assert bits == {
        "int8": 8 + 16 / 1024,
        "int4": 4.5,
        "int4-g64": 4.25,
        "int4-asym": 4.75,
        "int4-asym-g64": 4.375,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", STORAGES)
def test_tiles_are_parts_of_the_whole(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, cols in SHAPES:
        w = matrix(name, weights(rows, cols), dtype)
        whole = w.whole()
        assert w.shape == (rows, cols)
        assert whole.dtype == dtype
        buffer = torch.empty(rows * cols + 3, dtype=dtype)
        assert w.rows_per_tile(buffer) == rows + 3 // cols
        for _ in range(40):
            places = torch.randint(cols + 1, (2,), generator=generator).sort().values.tolist()
            buffer.fill_(torch.nan)
            if places[0] < places[1]:
                assert w.cols(*places, buffer).equal(whole[:, places[0] : places[1]])
            start, stop = (p * rows // cols for p in places)
            if start < stop:
                assert w.rows(start, stop, buffer).equal(whole[start:stop])
        indices = torch.randint(rows, (300,), generator=generator)
        taken = torch.full((300, cols), torch.nan, dtype=dtype)
        w.take(indices, taken)
        assert taken.equal(whole[indices])


@pytest.mark.parametrize("name", STORAGES)
def test_both_compute_dtypes_see_the_same_weights(name: str) -> None:
    """An integer of 8 bits times a bfloat16 scale has 16 significant bits: float32 holds it."""
    w = weights(64, 200)
    assert matrix(name, w).whole().double().equal(matrix(name, w, torch.float64).whole())


# The ends of an asymmetric group are rounded to its zero point's grid, which changes its scale.
@pytest.mark.parametrize("name", [name for name in STORAGES if "asym" not in name])
def test_what_was_quantised_stays_when_quantised_again(name: str) -> None:
    """Levels are fixed points, where the group's largest weight keeps its scale."""
    once = matrix(name, weights(33, 64)).whole()
    assert matrix(name, once).whole().equal(once)


def tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


@pytest.mark.parametrize("name", STORAGES)
def test_unpacking_takes_little_beside_the_buffer(name: str) -> None:
    """An eighth of the tile's float32, or the scales and zero points widened; as it is planned."""
    rows, cols = 128, 1024
    w, buffer = matrix(name, weights(rows, cols)), torch.empty(rows * cols)
    made: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's own
            given = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
            out = func(*args, **(kwargs or {}))
            storages = [t.untyped_storage() for t in tensors(out)]
            made.extend(one.nbytes() for one in storages if one.data_ptr() not in given)
            return out

    counted = STORAGES[name].scratch_bytes
    with Watch():
        w.rows(0, rows, buffer)
        assert max(made, default=0) <= counted(rows, (0, cols), cols, 4) <= max(4 * rows, sum(made))
        assert made or name == "int8"
        made.clear()
        w.cols(100, 612, buffer)
        assert (
            max(made, default=0) <= counted(rows, (100, 612), cols, 4) <= max(4 * rows, sum(made))
        )
        assert max(made, default=0) <= rows * cols * 4 // 8
