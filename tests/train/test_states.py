"""Optimiser state in fewer bits, and float32 masters of a bfloat16 adapter."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lowtide.errors import ConfigError
from lowtide.train.optim import OPTIMIZERS
from lowtide.train.settings import OptimizerSettings, StepSettings, check_step
from lowtide.train.states import BLOCK, PIECE, STATES, Moment, spans, state_bytes

COUNT = PIECE + 3 * BLOCK + 77  # a second piece, and a block that is not full
LOSSY = ("bfloat16", "8bit")
EPS32 = torch.finfo(torch.float32).eps


def numbers(signed: bool, count: int = COUNT) -> Tensor:
    """Values of ten orders of magnitude, zeros among them."""
    generator = torch.Generator().manual_seed(3)
    size = 10.0 ** (-10 * torch.rand(count, generator=generator))
    size[::50] = 0.0
    sign = torch.randint(2, (count,), generator=generator) * 2 - 1
    return size * sign if signed else size


def kept(moment: Moment, values: Tensor, seed: int) -> Tensor:
    """What a moment makes of values."""
    random = torch.Generator().manual_seed(seed)
    for span in spans(len(values), whole=False):
        moment.read("x", span).copy_(values[span])
        moment.write("x", span, random)
    return torch.cat([moment.read("x", s).clone() for s in spans(len(values), whole=False)])


def grid(state: str, values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """The neighbours of each value that can be kept, in float64: nearer to 0, and further."""
    size = values.double().abs()
    if state == "bfloat16":
        spacing = 2.0 ** (torch.frexp(size)[1].double() - 8)  # 8 bits of significand
        low = (size / spacing).floor() * spacing
        return low, low + spacing
    power, codes = 4, 127 if signed else 255
    low, high = torch.empty_like(size), torch.empty_like(size)
    for start in range(0, len(size), BLOCK):
        block = size[start : start + BLOCK]
        scale = float(block.max()) or 1.0
        # 1e-5 of a code: what float32 may be off by in a number that is exactly a code.
        code = (codes * (block / scale) ** (1 / power) + 1e-5).floor()
        low[start : start + BLOCK] = scale * (code / codes) ** power
        high[start : start + BLOCK] = scale * ((code + 1) / codes) ** power
        if not signed:
            least = torch.where((block > 0) & (code == 0), scale / codes**power, 0.0)
            low[start : start + BLOCK] += least
    return low, high


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("state", LOSSY)
def test_a_value_becomes_one_of_its_neighbours_and_itself_on_average(
    state: str, signed: bool
) -> None:
    values = numbers(signed)
    low, high = grid(state, values, signed)
    moment = STATES[state]({"x": values}, signed)
    total, draws = torch.zeros(COUNT, dtype=torch.float64), 200
    for seed in range(draws):
        got = kept(moment, values, seed).double()
        assert bool(((got == 0) | (got.sign() == values.sign())).all())
        distance = torch.minimum((got.abs() - low).abs(), (got.abs() - high).abs())
        assert bool((distance <= 8 * EPS32 * high).all())  # decoding takes a few roundings
        total += got.abs()
    mean, expected = total / draws, torch.maximum(values.double().abs(), low)
    # The chance of one element of 17,000 beyond 6 standard deviations is 3e-5.
    deviation = (high - low) / 2 / math.sqrt(draws)
    assert bool(((mean - expected).abs() <= 6 * deviation + 1e-5 * high).all())
    assert not bool((mean == low).all())


@pytest.mark.parametrize("signed", [True, False])
def test_the_largest_of_a_block_and_zero_are_kept(signed: bool) -> None:
    values = numbers(signed)
    got = kept(STATES["8bit"]({"x": values}, signed), values, 0)
    for start in range(0, COUNT, BLOCK):
        block = values[start : start + BLOCK]
        place = start + int(block.abs().argmax())
        assert got[place] == values[place]
    assert bool(((got == 0) <= (values == 0)).all()) or signed
    assert bool((got[values == 0] == 0).all())


@pytest.mark.parametrize("signed", [True, False])
def test_8_bits_are_those_of_the_formula_in_float64(signed: bool) -> None:
    values = numbers(signed, 10 * BLOCK)
    got = kept(STATES["8bit"]({"x": values}, signed), values, 11).double()
    draw = torch.rand(10, BLOCK, generator=torch.Generator().manual_seed(11)).double().view(-1)
    low, high = grid("8bit", values, signed)
    size = values.double().abs()
    share = (size - low) / (high - low)
    truth = torch.where(draw < share, high, low) * values.sign()
    close = (draw - share).abs() < 1e-3  # float32 may decide otherwise
    assert int(close.sum()) < 30
    error = (got - truth).abs()
    assert bool((error[~close] <= 8 * EPS32 * truth.abs()[~close]).all())


@pytest.mark.parametrize("state", LOSSY)
def test_a_second_moment_follows_its_gradients_down(state: str) -> None:
    """Rounding to the nearest leaves it where it was: 0.1% is less than half a distance."""
    values = numbers(False).clamp_(1e-3)
    moment = STATES[state]({"x": values}, False)
    kept(moment, values, 0)
    random = torch.Generator().manual_seed(1)
    for _ in range(1000):
        for span in spans(COUNT, whole=False):
            moment.read("x", span).mul_(0.999)
            moment.write("x", span, random)
    last = torch.cat([moment.read("x", span).clone() for span in spans(COUNT, whole=False)])
    ratio = float(last.double().sum() / values.double().sum())
    # Each element ends with a spread of at most a third of itself; 17,000 average it to 0.3%.
    assert ratio == pytest.approx(0.999**1000, rel=0.015)


def gradients(steps: int, count: int = COUNT) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    scales = 10.0 ** -torch.rand(count, generator=generator)
    return [torch.randn(count, generator=generator) * scales for _ in range(steps)]


def trained(start: Tensor, grads: list[Tensor], **given: object) -> list[Tensor]:
    """The parameter after each step, as the adapter holds it."""
    settings = OptimizerSettings(learning_rate=1e-2, **given)
    parameters = {"x": start.clone().view(-1, 1)}
    optimizer = OPTIMIZERS[settings.optimizer](settings, parameters)
    after = []
    for step, grad in enumerate(grads, start=1):
        wide = grad.to(start.dtype) if start.dtype.itemsize > 2 else grad
        optimizer.start(step, settings.learning_rate)
        optimizer.update("x", parameters["x"], wide.clone().view(-1, 1))  # which is overwritten
        after.append(parameters["x"].view(-1).clone())
    return after


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("state", LOSSY)
@pytest.mark.parametrize(
    "given", [{}, {"optimizer": "sgd", "momentum": 0.9}, {"optimizer": "lion"}]
)
def test_updates_stay_near_those_of_whole_state(
    given: dict[str, object], state: str, dtype: torch.dtype
) -> None:
    start, grads = torch.zeros(COUNT, dtype=dtype), gradients(60)
    given = {"weight_decay": 0.01, **given}
    truth = trained(start.double(), [g.double() for g in grads], **given)
    ours = trained(start, grads, optimizer_state=state, **given)
    # State is rounded after it has been used: the first update is that of whole state.
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-5, atol=1e-9)
    moved = float(truth[-1].norm())
    # Lion's update flips where the blend is smaller than its error. In 8 bits a number of a tenth
    # of its block's largest is off by 2.8% per write, which adds up over 1 / (1 - beta2^2) = 50 to
    # 20% of the mean; that is half the blend of such gradients, so that 3.4% of the signs flip, by
    # 2: sqrt(0.034) 2 = 0.37 of an update.
    most = 0.37 if given.get("optimizer") == "lion" else 0.06
    assert 0 < float((ours[-1].double() - truth[-1]).norm()) < most * moved


def test_rounding_depends_on_the_step_and_the_place_alone() -> None:
    grads, given = gradients(6), {"optimizer_state": "8bit"}
    first, again = (trained(torch.zeros(COUNT), grads, **given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("state", ["float32", "8bit"])
@pytest.mark.parametrize("given", [{}, {"optimizer": "sgd"}, {"optimizer": "lion"}])
def test_a_bfloat16_adapter_has_float32_masters(given: dict[str, object], state: str) -> None:
    """The same gradients move a float32 adapter, to which rounding comes after the update."""
    if given.get("optimizer") == "sgd" and state != "float32":
        given = {**given, "momentum": 0.5}
    given = {"optimizer_state": state, "weight_decay": 0.1, **given}
    start = numbers(True).bfloat16()
    grads = [grad * 1e-2 for grad in gradients(40)]  # most updates are below half a distance
    masters = trained(start.float(), grads, **given)
    ours = trained(start, grads, **given)
    for master, held in zip(masters, ours, strict=True):
        away = torch.nextafter(master, master.sign() * math.inf)  # ties go away from 0
        up, even = away.bfloat16(), master.bfloat16()
        assert torch.equal(held, torch.where(is_tie(master), up, even))
    assert not torch.equal(ours[-1], start)
    assert not any(torch.equal(a, b) for a, b in pairwise(ours))


def is_tie(x: Tensor) -> Tensor:
    """Whether a float32 number lies in the middle between two of bfloat16."""
    return (x.view(torch.int32) & 0xFFFF) == 0x8000


def test_ties_and_extremes_come_back_to_the_bit() -> None:
    from lowtide.train.states import Master

    bits = [0, 1, 0x8000, 0x3F808000, 0x3F807FFF, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0x00800000]
    values = torch.tensor([*bits, *(b - (1 << 31) for b in bits)], dtype=torch.int32)
    floats = values.view(torch.float32)
    upper = torch.zeros(len(bits) * 2, dtype=torch.bfloat16)
    master = Master({"x": upper})
    whole = slice(0, len(upper))
    master.read("x", upper, whole).copy_(floats)
    master.write("x", upper, whole)
    assert torch.equal(master.read("x", upper, whole).view(torch.int32), values)
    error = (upper.double() - floats.double()).abs()
    nearest = (floats.bfloat16().double() - floats.double()).abs()
    assert bool((error.nan_to_num(0) == nearest.nan_to_num(0)).all())


@pytest.mark.parametrize("state", list(STATES))
def test_bytes_are_those_of_the_tensors(state: str) -> None:
    sizes = {"a": (8, 896), "b": (4864, 8), "c": (3, 5)}
    moment = STATES[state]({n: torch.empty(s) for n, s in sizes.items()}, True)
    held: dict[int, int] = {}
    for value in vars(moment).values():
        for tensor in value.values() if isinstance(value, dict) else [value]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                held[storage.data_ptr()] = storage.nbytes()
    counted = state_bytes(state, [math.prod(shape) for shape in sizes.values()])
    assert sum(held.values()) == counted


def test_state_that_nobody_keeps_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="--optimizer-state 8bit is for adamw, lion, and sgd with"
    ):
        check_step(StepSettings(optimizer="sgd", optimizer_state="8bit"))
    check_step(StepSettings(optimizer="sgd", momentum=0.5, optimizer_state="8bit"))
