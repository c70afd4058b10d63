"""Products by either library against float64, whatever the number of rows and the layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowtide.ops import products
from lowtide.ops.products import (
    add_product_,
    goes_to_onednn,
    kernels,
    onednn_is_faster,
    product_,
    products_as,
    scratch_bytes,
)

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(params=["mkl", "onednn"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(products.VARIABLE, request.param)
    onednn_is_faster.cache_clear()
    yield request.param
    onednn_is_faster.cache_clear()


def _operands(rows: int, inner: int, columns: int, layout: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rows + inner + columns)
    x, w = torch.randn(rows, inner + 16), torch.randn(columns, inner)
    if layout == "rows":
        return x[:, :inner].contiguous(), w.t().contiguous()
    return x[:, 16:], w.t()  # rows of x apart from each other, w by columns


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize(
    ("rows", "inner", "columns"),
    [(1, 64, 64), (63, 80, 96), (64, 64, 64), (100, 40, 72), (255, 96, 128), (256, 128, 200),
     (700, 33, 65), (130, 48, 4100), (90, 8, 64), (300, 64, 24)],
)  # fmt: skip
def test_each_element_is_a_float32_sum(
    library: str, rows: int, inner: int, columns: int, layout: str
) -> None:
    """A sum of k rounded products is off by at most k eps times the sum of their sizes."""
    x, w_t = _operands(rows, inner, columns, layout)
    truth = x.double() @ w_t.double()
    bound = (inner + 1) * EPS * (x.double().abs() @ w_t.double().abs())
    out = torch.full((rows, columns), float("nan"))
    assert product_(out, x, w_t) is out
    assert bool(((out.double() - truth).abs() <= bound).all())
    before = torch.randn(rows, columns)
    summed = before.clone()
    assert add_product_(summed, x, w_t) is summed
    slack = bound + EPS * (before.double() + truth).abs()
    assert bool(((summed.double() - before.double() - truth).abs() <= slack).all())


def test_results_go_into_columns_of_a_larger_matrix(library: str) -> None:
    x, w_t = _operands(150, 64, 80, "columns")
    whole = torch.zeros(150, 240)
    product_(whole[:, 80:160], x, w_t)
    assert torch.equal(whole[:, :80], torch.zeros(150, 80))
    assert torch.equal(whole[:, 160:], torch.zeros(150, 80))
    assert torch.equal(whole[:, 80:160], product_(torch.empty(150, 80), x, w_t))


@pytest.mark.parametrize("apart", ["x", "w"])
def test_layouts_that_onednn_has_no_kernel_for_are_torchs(
    library: str, apart: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w_t = torch.randn(128, 64), torch.randn(64, 96)
    if apart == "x":
        x = x.t().contiguous().t()
    else:
        w_t = torch.randn(96, 200)[:, :64].t()
    monkeypatch.setattr(products, "_onednn", lambda x, w_t: pytest.fail("it went to oneDNN"))
    assert torch.equal(product_(torch.empty(128, 96), x, w_t), x @ w_t)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_torchs(library: str, dtype: torch.dtype) -> None:
    x, w_t = (t.to(dtype) for t in _operands(80, 64, 96, "rows"))
    assert torch.equal(product_(torch.empty(80, 96, dtype=dtype), x, w_t), x @ w_t)
    assert scratch_bytes(256, 896, dtype) == 0


def test_the_same_product_is_the_same_to_the_bit(library: str) -> None:
    x, w_t = _operands(255, 96, 128, "columns")
    first = product_(torch.empty(255, 128), x, w_t)
    assert all(torch.equal(first, product_(torch.empty(255, 128), x, w_t)) for _ in range(5))


def test_few_sizes_of_pieces(library: str) -> None:
    """Three sizes at most, whatever the length of a sequence."""
    seen: set[int] = set()
    for rows in range(1, 1200):
        sizes = kernels(rows, 256)
        seen |= sizes
        pieces = list(products._pieces(rows, 256)) if rows >= 64 else []
        fresh = [row for _, start, stop in pieces for row in range(start, stop)]
        assert fresh == list(range(rows if pieces else 0))
        assert all(0 <= start <= first for start, first, _ in pieces)
    assert seen == ({64, 128, 256} if library == "onednn" else set())


def test_a_choice_of_torch_is_kept_for_as_long_as_it_was_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    with products_as("torch"):
        assert not goes_to_onednn()
        assert kernels(256, 256) == set()
    assert goes_to_onednn()


@pytest.mark.parametrize(
    ("capability", "vendor", "expected"),
    [("AVX512", "AuthenticAMD", True), ("AVX512", "GenuineIntel", False),
     ("AVX2", "AuthenticAMD", False)],
)  # fmt: skip
def test_the_processor_decides(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: str, vendor: str, expected: bool
) -> None:
    (tmp_path / "cpuinfo").write_text(f"vendor_id\t: {vendor}\n")
    monkeypatch.delenv(products.VARIABLE, raising=False)
    monkeypatch.setattr(products, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    onednn_is_faster.cache_clear()
    with torch.device("meta"):  # as where sizes are predicted
        assert onednn_is_faster() is expected
    onednn_is_faster.cache_clear()
