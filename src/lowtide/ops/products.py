"""Large float32 products, by whichever library inside torch runs them fastest on this processor.

torch sends float32 products to MKL, which uses half of the vectors of AVX-512 processors that are
not Intel's: 220 GFLOP/s on two such cores where oneDNN, in the same torch, reaches 500. There
products go to `mkldnn::_linear_pointwise`, the operation behind linears that torch compiles;
everywhere else, and for other dtypes, to `mm` and `addmm`. All of them are plain float32.

oneDNN keeps half a MB for each shape of a product and makes a new tensor for each result. So rows
go to it in pieces of three sizes, the last of which may cover again what the one before covered,
and whose results are small enough for malloc to reuse their pages.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

CHOICES = ("auto", "torch")
"""Where products go: to what suits the processor, or to `torch.mm` and no other library."""
VARIABLE = "LOWTIDE_PRODUCTS"
"""Environment variable: `mkl` or `onednn` instead of what suits the processor."""
_MOST_ROWS, _FEWEST_ROWS, _FEWEST_COLUMNS = 256, 64, 64
_PIECE_BYTES = (1 << 20) - (1 << 14)
"""Of a piece's result at most: malloc maps larger ones apart, with fresh pages each time."""
KERNEL_BYTES = 550_000
"""What oneDNN keeps for one shape of a product, measured."""
_CPUINFO = Path("/proc/cpuinfo")


def product_(out: Tensor, x: Tensor, w_t: Tensor) -> Tensor:
    """`out = x w_t`.

    Args:
        out: `(T, n)`, overwritten.
        x: `(T, k)`.
        w_t: `(k, n)`, in rows or in columns.

    Returns:
        `out`.
    """
    if not _worthwhile(x, w_t):
        return torch.mm(x, w_t, out=out)
    if out.shape[0] == _most_rows(out.shape[1]):
        return out.copy_(_onednn(x, w_t))
    for start, _, stop in _pieces(*out.shape):
        out[start:stop].copy_(_onednn(x[start:stop], w_t))
    return out


def add_product_(out: Tensor, x: Tensor, w_t: Tensor) -> Tensor:
    """`out += x w_t`, with the shapes of `product_`."""
    if not _worthwhile(x, w_t):
        return out.addmm_(x, w_t)
    if out.shape[0] == _most_rows(out.shape[1]):
        return out.add_(_onednn(x, w_t))
    for start, fresh, stop in _pieces(*out.shape):
        out[fresh:stop].add_(_onednn(x[start:stop], w_t)[fresh - start :])
    return out


def scratch_bytes(tokens: int, columns: int, dtype: torch.dtype) -> int:
    """What a product `(tokens, columns)` makes beside its result; 0 where it writes that itself."""
    if dtype != torch.float32 or not goes_to_onednn() or tokens < _FEWEST_ROWS:
        return 0
    return min(tokens, _most_rows(columns)) * columns * dtype.itemsize


def kernels(tokens: int, columns: int) -> set[int]:
    """Rows of the pieces that a product of that many columns goes to oneDNN in.

    Args:
        tokens: rows of the product.
        columns: of its result.

    Returns:
        One size for each kernel that it needs; none where it does not go there.
    """
    if tokens < _FEWEST_ROWS or columns < _FEWEST_COLUMNS or not goes_to_onednn():
        return set()
    return {stop - start for start, _, stop in _pieces(tokens, columns)}


_chosen = CHOICES[0]


def use_products(choice: str) -> None:
    """Decide for this process, like its number of threads, which of CHOICES products go to."""
    global _chosen
    _chosen = choice


@contextmanager
def products_as(choice: str) -> Iterator[None]:
    """Decide for as long as the context lasts: to predict what the other choice would take."""
    before = _chosen
    use_products(choice)
    try:
        yield
    finally:
        use_products(before)


def goes_to_onednn() -> bool:
    """Whether float32 products go to oneDNN."""
    return _chosen == "auto" and onednn_is_faster()


@cache
def onednn_is_faster() -> bool:
    """Decided by the processor, not by a measurement, so that runs repeat to the bit.

    Returns:
        True on AVX-512 processors that are not Intel's, where torch has the operation.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "mkl" or not _works():
        return False
    if wanted == "onednn":
        return True
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and not _is_intel()


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in _CPUINFO.read_text(errors="replace")
    except OSError:
        return True


def _works() -> bool:
    x = torch.ones(2, 2, device="cpu")
    try:
        return torch.equal(_onednn(x, x), torch.full((2, 2), 2.0, device="cpu"))
    except (AttributeError, RuntimeError, TypeError):
        return False


def _onednn(x: Tensor, w_t: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, w_t.t(), None, "none", [], "")
    return found


def _worthwhile(x: Tensor, w_t: Tensor) -> bool:
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.shape[0] >= _FEWEST_ROWS
        and w_t.shape[1] >= _FEWEST_COLUMNS
        # For other layouts oneDNN has only loops for reference, 700 times as slow.
        and x.stride(1) == 1
        and (w_t.is_contiguous() or w_t.t().is_contiguous())
        and goes_to_onednn()
    )


def _most_rows(columns: int) -> int:
    """Rows of the largest piece: a power of two."""
    most = max(_FEWEST_ROWS, min(_MOST_ROWS, _PIECE_BYTES // (4 * columns)))
    return 1 << (most.bit_length() - 1)


def _pieces(rows: int, columns: int) -> Iterator[tuple[int, int, int]]:
    """Pieces `[start, stop)` that cover all rows, of which those from `fresh` on are new."""
    size, fresh = _most_rows(columns), 0
    while fresh < rows:
        # A larger piece that covers an eighth again is cheaper than smaller ones.
        while size > _FEWEST_ROWS and (size > rows or size - (rows - fresh) > size // 8):
            size //= 2
        stop = min(fresh + size, rows)
        yield stop - size, fresh, stop
        fresh = stop
