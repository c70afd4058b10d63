"""What an optimiser keeps of each parameter, in fewer bits than it computes with. Lossy.

A moment is unpacked, changed and packed again a piece of one parameter at a time, in one buffer of
`PIECE` elements, so that its float32 form never exists as a whole.

**Rounding is stochastic** everywhere: a value between two neighbours that can be stored becomes the
upper one with the probability that makes its mean the value itself. Rounding to the nearest would
not do. A second moment with beta2 = 0.999 shrinks by 0.1% when a gradient is 0; neighbours are
further apart than twice that in 16 bits as in 8, so that it would never shrink. The random numbers
follow from the step and the place alone.

`bfloat16` keeps the upper half of float32: 2 bytes, relative error below 2^-7.

`8bit` keeps one byte per element and a float32 scale per block of 256 elements of a parameter, the
blocks of arXiv 2110.02861: 1.016 bytes. Its tree of decades is replaced by a power law, which has a
nearer neighbour for what is small in its block (docs/log.md has both):

    x ~ s sign(c) (|c| / C)^4      s = max |x| over the block
    mean             C = 127, c in -127 .. 127
    second moment    C = 255, c in 0 .. 255

The largest of a block is kept to the bit, and 0 stays 0. With c the lower neighbour's code an error
is less than the neighbours' distance, `s ((c + 1)^4 - c^4) / C^4`: of a mean, at most 3.2% of s; of
the root of a second moment, which is what an update divides by, `sqrt(s) (2 c + 1) / C^2`, at most
0.8% of sqrt(s). A second moment above 0 is never stored as 0, but as 1 at least: or else the mean
beside it would be divided by epsilon.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

BLOCK = 256
PIECE = 64 * BLOCK
"""Elements that are unpacked at a time: 64 KB in float32, so that a core's cache holds them."""
_MEAN_CODES, _SQUARE_CODES = 127, 255
_HALF_BITS = 16


class Moment(Protocol):
    """One number per element of every parameter, zero at first."""

    def read(self, name: str, span: slice) -> Tensor:
        """Elements `span` of a parameter, flat; to be changed in place, then written back."""

    def write(self, name: str, span: slice, random: torch.Generator) -> None:
        """Keep what was made of the elements that were read last."""

    def tensors(self) -> dict[str, Tensor]:
        """All that is kept, by parameter and part: the tensors themselves, not copies."""


def zeros_for(parameters: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Zeros for each parameter, flat, all views of one tensor.

    Backed by memory as they are first written.
    """
    parts = _parts([p.numel() for p in parameters.values()], dtype)
    return dict(zip(parameters, parts, strict=True))


def _parts(sizes: Sequence[int], dtype: torch.dtype) -> Sequence[Tensor]:
    return torch.split(torch.zeros(sum(sizes), dtype=dtype), list(sizes))


class WholeMoment:
    """As wide as the computation, and float32 at least: nothing is packed."""

    def __init__(self, parameters: Mapping[str, Tensor], signed: bool) -> None:
        """Reserve it."""
        self._parts = zeros_for(parameters, wide_dtype(parameters))

    def read(self, name: str, span: slice) -> Tensor:
        """See `Moment.read`: the kept elements themselves."""
        return self._parts[name][span]

    def write(self, name: str, span: slice, random: torch.Generator) -> None:
        """See `Moment.write`: nothing is left to do."""

    def tensors(self) -> dict[str, Tensor]:
        """See `Moment.tensors`."""
        return dict(self._parts)


class HalfMoment:
    """bfloat16, rounded stochastically."""

    def __init__(self, parameters: Mapping[str, Tensor], signed: bool) -> None:
        """Reserve it."""
        self._parts = zeros_for(parameters, torch.bfloat16)
        self._wide = torch.empty(PIECE)

    def read(self, name: str, span: slice) -> Tensor:
        """See `Moment.read`."""
        part = self._parts[name][span]
        return self._wide[: len(part)].copy_(part)

    def write(self, name: str, span: slice, random: torch.Generator) -> None:
        """See `Moment.write`. Random lower bits carry into the upper ones, which are kept."""
        part = self._parts[name][span]
        wide = self._wide[: len(part)]
        bits = wide.view(torch.int32)
        size = (len(part),)
        bits += torch.randint(1 << _HALF_BITS, size, generator=random, dtype=torch.int32)
        bits &= -1 << _HALF_BITS
        part.copy_(wide)

    def tensors(self) -> dict[str, Tensor]:
        """See `Moment.tensors`."""
        return dict(self._parts)


class ByteMoment:
    """One byte per element and one scale per block; see the module's text."""

    def __init__(self, parameters: Mapping[str, Tensor], signed: bool) -> None:
        """Reserve it; each parameter is filled up to whole blocks."""
        self._signed, self._most = signed, _MEAN_CODES if signed else _SQUARE_CODES
        counts = [_blocks(p.numel()) for p in parameters.values()]
        codes = _parts([n * BLOCK for n in counts], torch.int8 if signed else torch.uint8)
        names = list(parameters)
        self._codes = {n: c.view(-1, BLOCK) for n, c in zip(names, codes, strict=True)}
        self._scales = dict(zip(names, _parts(counts, torch.float32), strict=True))
        self._sizes = {name: p.numel() for name, p in parameters.items()}
        self._wide = torch.empty(PIECE // BLOCK, BLOCK)

    def read(self, name: str, span: slice) -> Tensor:
        """See `Moment.read`; `span` starts at a block."""
        blocks = _block_span(span)
        codes = self._codes[name][blocks]
        wide = self._wide[: len(codes)].copy_(codes)
        wide.div_(self._most)
        sign = wide.sign()
        wide.square_().square_().mul_(sign)
        wide.mul_(self._scales[name][blocks].unsqueeze(1))
        return wide.view(-1)[: min(span.stop, self._sizes[name]) - span.start]

    def write(self, name: str, span: slice, random: torch.Generator) -> None:
        """See `Moment.write`."""
        blocks = _block_span(span)
        codes = self._codes[name][blocks]
        wide = self._wide[: len(codes)]
        size = wide.abs()
        scale = size.amax(1, keepdim=True)
        size.div_(scale.masked_fill(scale == 0, 1.0))
        draw = torch.rand(size.shape, generator=random)
        code = _rounded_up(size.sqrt_().sqrt_().mul_(self._most), draw)
        if not self._signed:
            torch.maximum(code, (wide > 0).float(), out=code)
        codes.copy_(code.copysign_(wide))
        self._scales[name][blocks].copy_(scale.squeeze(1))

    def tensors(self) -> dict[str, Tensor]:
        """See `Moment.tensors`."""
        codes = {f"{name}.codes": codes for name, codes in self._codes.items()}
        return {**codes, **{f"{name}.scales": scales for name, scales in self._scales.items()}}


def _rounded_up(root: Tensor, draw: Tensor) -> Tensor:
    """Codes for `root^4`: a neighbour of root, the upper one where chance says so.

    Args:
        root: what the code would be if it could be a fraction; overwritten.
        draw: as many numbers of [0, 1).

    Returns:
        Whole numbers c, as floats; the mean of `c^4` is `root^4`.
    """
    code = root.floor()
    below, above = code.square().square_(), (code + 1).square_().square_()
    share = root.square_().square_().sub_(below).div_(above.sub_(below))
    return code.add_(draw < share)


def _blocks(count: int) -> int:
    return -(-count // BLOCK)


def _block_span(span: slice) -> slice:
    return slice(span.start // BLOCK, _blocks(span.stop))


class Master:
    """float32 parameters of which the adapter holds the upper half, in bfloat16.

    What is kept here is the rest: the 16 lower bits, as the distance from the bfloat16 number. Both
    together are the float32 number to the bit, in its 4 bytes. The bfloat16 number is the nearest;
    of two equally near the one further from 0, so that the distance fits into 16 bits.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        """The float32 parameters begin where the bfloat16 ones are."""
        self._rest = zeros_for(parameters, torch.int16)
        self._wide = torch.empty(PIECE)

    def read(self, name: str, upper: Tensor, span: slice) -> Tensor:
        """Elements `span` of a parameter in float32, flat; to be changed, then written back.

        Args:
            name: of the parameter.
            upper: its elements `span` as the adapter holds them.
            span: which.

        Returns:
            A buffer that the next read overwrites.
        """
        bits = self._wide[: len(upper)].view(torch.int32).copy_(upper.view(torch.int16))
        bits.bitwise_left_shift_(_HALF_BITS).add_(self._rest[name][span])
        return bits.view(torch.float32)

    def write(self, name: str, upper: Tensor, span: slice) -> None:
        """Keep what was made of the elements that were read last; `upper` is overwritten."""
        bits = self._wide[: len(upper)].view(torch.int32)
        nearest = (bits + (1 << _HALF_BITS - 1)).bitwise_right_shift_(_HALF_BITS)
        upper.view(torch.int16).copy_(nearest)
        self._rest[name][span].copy_(bits.sub_(nearest.bitwise_left_shift_(_HALF_BITS)))

    def tensors(self) -> dict[str, Tensor]:
        """All that is kept, by parameter: the tensors themselves, not copies."""
        return dict(self._rest)


STATES: dict[str, Callable[[Mapping[str, Tensor], bool], Moment]] = {
    "float32": WholeMoment,
    "bfloat16": HalfMoment,
    "8bit": ByteMoment,
}
"""What `--optimizer-state` takes -> a moment of all parameters; signed, or never negative."""


def wide_dtype(parameters: Mapping[str, Tensor]) -> torch.dtype:
    """What an optimiser computes with: the parameters' dtype, and float32 at least."""
    return torch.promote_types(next(iter(parameters.values())).dtype, torch.float32)


def spans(count: int, *, whole: bool) -> Iterator[slice]:
    """The elements of a parameter, all at once or in pieces."""
    step = count if whole else PIECE
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


_PACKING_PIECES = {"float32": 0, "bfloat16": 1, "8bit": 6}


def packing_bytes(state: str) -> int:
    """What packing one piece allocates and frees."""
    return 4 * PIECE * _PACKING_PIECES[state]


def master_bytes(sizes: Iterable[int]) -> int:
    """Bytes that `Master` keeps of parameters of so many elements."""
    return 2 * sum(sizes) + 4 * PIECE


def state_bytes(state: str, sizes: Iterable[int], itemsize: int = 4) -> int:
    """Bytes of one moment.

    Args:
        state: a name of STATES.
        sizes: elements of each parameter.
        itemsize: bytes of an element of the computation.

    Returns:
        Bytes, the buffer of a piece among them.
    """
    if state == "float32":
        return sum(sizes) * itemsize
    if state == "bfloat16":
        return 2 * sum(sizes) + 4 * PIECE
    return sum(map(_blocks, sizes)) * (BLOCK + 4) + 4 * PIECE
