"""The contract with the sink, and what a step reads: each weight once in each pass, no more."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import EPS32, random_adapter, random_batch, relative
from torch import Tensor

import lowtide as lt
from lowtide.errors import ConfigError, DataError, TrainingError
from lowtide.methods import Step, get_method
from lowtide.methods.mesp import Mesp
from lowtide.model.decoder import Decoder
from lowtide.model.spec import SEPARATE
from lowtide.model.workspace import Workspace
from lowtide.weights.matrix import MappedMatrix


@pytest.fixture
def model(odd_model: Callable[..., Path]) -> Decoder:
    return lt.load_model(odd_model("llama-biases-llama3"), compute_dtype="float64")


@pytest.fixture
def batch() -> lt.Batch:
    return lt.Batch.from_sequences(*random_batch(131, [23, 1, 9], masked=0.3))


class _Keep:
    def __init__(self) -> None:
        self.grads: dict[str, Tensor] = {}

    def add(self, name: str, grad: Tensor) -> None:
        assert name not in self.grads
        self.grads[name] = grad.clone()


class _Poison(_Keep):
    """Overwrites each parameter, and the gradient itself, as soon as the gradient is there."""

    def __init__(self, adapter: lt.Adapter) -> None:
        super().__init__()
        self._adapter = adapter

    def add(self, name: str, grad: Tensor) -> None:
        super().add(name, grad)
        self._adapter.parameters[name].fill_(torch.nan)
        grad.fill_(torch.nan)


@pytest.mark.parametrize("modules", ["all-linear", "q_proj,down_proj", "k_proj,up_proj"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_parameter_may_change_as_soon_as_its_gradient_is_added(
    modules: str, dropout: float, model: Decoder, batch: lt.Batch
) -> None:
    config = lt.LoraConfig(r=3, target_modules=modules, lora_dropout=dropout)
    truth = lt.gradients(model, random_adapter(model, config), batch, "mesp", dropout_seed=2)
    adapter = random_adapter(model, config)
    sink = _Poison(adapter)
    Mesp().step(model, adapter, batch, sink, Step(1.0 / batch.n_tokens, 2))
    assert all(bool(p.isnan().all()) for p in adapter.parameters.values())
    assert set(sink.grads) == set(truth.grads)
    assert all(sink.grads[name].equal(grad) for name, grad in truth.grads.items())


class _Forget:
    """Remembers gradients only weakly, and how many were alive at each call."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, weakref.ref[Tensor]]] = []
        self.alive: dict[str, set[str]] = {}

    def add(self, name: str, grad: Tensor) -> None:
        self.alive[name] = {other for other, ref in self.seen if ref() is not None}
        self.seen.append((name, weakref.ref(grad)))


def _module(name: str) -> str:
    """`3.mlp` of `base_model.model.model.layers.3.mlp.up_proj.lora_A.weight`."""
    return ".".join(name.split(".layers.")[1].split(".")[:2])


def _linear(name: str) -> str:
    return name.split(".lora_")[0]


def test_no_gradient_is_kept_once_it_was_added(model: Decoder, batch: lt.Batch) -> None:
    adapter, sink = random_adapter(model, lt.LoraConfig(r=3)), _Forget()
    Mesp().step(model, adapter, batch, sink, Step(1.0))
    assert len(sink.seen) == len(adapter.parameters)
    assert [name for name, ref in sink.seen if ref() is not None] == []
    for name, alive in sink.alive.items():
        # Within the MLP the three linears finish together; elsewhere only A and B of one do.
        same = _module if ".mlp." in name else _linear
        assert {same(other) for other in alive} <= {same(name)}, name


def test_gradients_come_in_reverse_block_order(model: Decoder, batch: lt.Batch) -> None:
    sink = _Keep()
    Mesp().step(model, random_adapter(model, lt.LoraConfig(r=3)), batch, sink, Step(1.0))
    blocks = [int(name.split(".layers.")[1].split(".")[0]) for name in sink.grads]
    assert blocks == sorted(blocks, reverse=True)


@pytest.mark.parametrize("method", ["mesp", "mebp", "autograd"])
def test_the_scale_and_the_returned_sum(method: str, model: Decoder, batch: lt.Batch) -> None:
    adapter = random_adapter(model, lt.LoraConfig(r=3))
    sinks = _Keep(), _Keep()
    totals = [
        get_method(method).step(model, adapter, batch, sink, Step(scale))
        for sink, scale in zip(sinks, (1.0, 0.125), strict=True)
    ]
    assert totals[0] == totals[1]
    assert totals[0] == pytest.approx(get_method(method).loss(model, adapter, batch), rel=1e-12)
    assert totals[0] / batch.n_tokens == lt.gradients(model, adapter, batch, method).loss
    for name, grad in sinks[0].grads.items():
        assert relative(sinks[1].grads[name], grad * 0.125) < 1e-12


class _Counting:
    """A frozen matrix that counts the elements read from it."""

    def __init__(self, inner: MappedMatrix, name: str, reads: Counter[str]) -> None:
        self._inner, self._name, self._reads = inner, name, reads

    @property
    def shape(self) -> tuple[int, int]:
        return self._inner.shape

    def rows_per_tile(self, buffer: Tensor) -> int:
        return self._inner.rows_per_tile(buffer)

    def take(self, indices: Tensor, out: Tensor) -> None:
        self._inner.take(indices, out)

    def rows(self, start: int, stop: int, buffer: Tensor) -> Tensor:
        self._reads[self._name] += (stop - start) * self.shape[1]
        return self._inner.rows(start, stop, buffer)

    def cols(self, start: int, stop: int, buffer: Tensor) -> Tensor:
        self._reads[self._name] += (stop - start) * self.shape[0]
        return self._inner.cols(start, stop, buffer)


def test_each_weight_is_read_no_more_often_than_the_method_needs(
    model: Decoder, batch: lt.Batch
) -> None:
    reads: Counter[str] = Counter()
    sizes: dict[str, int] = {}

    def counted(matrix: MappedMatrix, name: str) -> _Counting:
        sizes[name] = matrix.shape[0] * matrix.shape[1]
        return _Counting(matrix, name, reads)

    for layer, linears in enumerate(model.linears):
        for name, frozen in linears.items():
            linears[name] = frozen._replace(weight=counted(frozen.weight, f"{layer}.{name}"))  # type: ignore[arg-type]
    model.head = counted(model.head, "head")  # type: ignore[assignment]
    Mesp().step(model, random_adapter(model, lt.LoraConfig(r=3)), batch, _Keep(), Step(1.0))

    assert reads["head"] == sizes["head"], "one sweep gives the loss and its gradient"
    last = len(model.linears) - 1
    for name, _ in SEPARATE:
        times = {layer: reads[f"{layer}.{name}"] / sizes[f"{layer}.{name}"] for layer in (0, last)}
        if name.startswith("mlp."):
            # Forward, and one widened tile for the recompute and the input gradient together. Of
            # down only the input gradient: its product is not needed again.
            assert times == {0: 2, last: 2}, name
        elif name == "self_attn.o_proj":
            assert times == {0: 3, last: 3}, name
        else:
            # Forward, recompute, input gradient; nobody needs the first block's.
            assert times == {0: 2, last: 3}, name


def _poisoned(self: Workspace) -> None:
    buffers = [*self._wide, *self._narrow, self.tile, self._columns, *self.scores]
    for buffer in buffers:
        buffer.fill_(torch.nan)


def test_nothing_is_read_from_a_buffer_before_it_is_written(
    model: Decoder, batch: lt.Batch
) -> None:
    adapter = random_adapter(model, lt.LoraConfig(r=3, lora_dropout=0.2))
    truth = lt.gradients(model, adapter, batch, dropout_seed=1)
    method = Mesp()
    method.reserve(model, 200, 100)
    workspace, rows = method._buffers._ws, method._buffers._rows
    assert workspace is not None
    assert rows is not None
    for _ in range(2):
        _poisoned(workspace)
        rows.fill_(torch.nan)
        again = lt.gradients(model, adapter, batch, method, dropout_seed=1)
        assert again.loss == pytest.approx(truth.loss, rel=1e-12)
        # A workspace for longer batches has other tiles, and so another order of sums.
        assert max(relative(again.grads[n], g) for n, g in truth.grads.items()) < 1e-12


def test_buffers_serve_batches_of_any_order(model: Decoder) -> None:
    adapter, method = random_adapter(model, lt.LoraConfig(r=3)), Mesp()
    for lengths in ([5, 2], [40], [3], [17, 30, 1], [64], [2]):
        batch = lt.Batch.from_sequences(*random_batch(131, lengths, seed=len(lengths)))
        ours = lt.gradients(model, adapter, batch, method)
        truth = lt.gradients(model, adapter, batch, "autograd")
        assert ours.loss == pytest.approx(truth.loss, rel=1e-12)
        # All in one vector: two tokens leave q and k without any gradient.
        everything = [torch.cat([g.flatten() for g in o.grads.values()]) for o in (ours, truth)]
        assert relative(*everything) < 1e-12
        assert method.loss(model, adapter, batch) == pytest.approx(
            ours.loss * ours.n_tokens, rel=1e-12
        )


def test_packing_is_exact(model: Decoder) -> None:
    """The gradient of a packed batch is the token-weighted sum of its sequences' own."""
    ids, labels = random_batch(131, [23, 9, 31], masked=0.3)
    adapter = random_adapter(model, lt.LoraConfig(r=3))
    packed = lt.gradients(model, adapter, lt.Batch.from_sequences(ids, labels))
    apart = [
        lt.gradients(model, adapter, lt.Batch.from_sequences([row], [row_labels]))
        for row, row_labels in zip(ids, labels, strict=True)
    ]
    total = sum(one.n_tokens for one in apart)
    assert packed.n_tokens == total
    assert packed.loss == pytest.approx(sum(o.loss * o.n_tokens for o in apart) / total, rel=1e-12)
    for name, grad in packed.grads.items():
        summed = sum(one.grads[name] * (one.n_tokens / total) for one in apart)
        assert isinstance(summed, Tensor)
        assert relative(grad, summed) < 1e-12


def test_a_step_leaves_the_adapter_as_it_was(model: Decoder, batch: lt.Batch) -> None:
    adapter = random_adapter(model, lt.LoraConfig(r=3))
    before = {name: p.clone() for name, p in adapter.items()}
    for method in ("mesp", "mebp", "autograd"):
        first = lt.gradients(model, adapter, batch, method)
        second = lt.gradients(model, adapter, batch, method)
        assert all(first.grads[n].equal(second.grads[n]) for n in before)
    assert all(p.equal(before[name]) for name, p in adapter.items())
    assert not any(p.requires_grad for p in adapter.parameters.values())


@pytest.mark.parametrize("method", ["mesp", "mebp", "autograd"])
def test_a_loss_that_is_not_finite_reaches_no_sink(
    method: str, model: Decoder, batch: lt.Batch
) -> None:
    adapter, sink = random_adapter(model, lt.LoraConfig(r=3)), _Keep()
    next(iter(adapter.parameters.values())).fill_(torch.inf)
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf)"):
        get_method(method).step(model, adapter, batch, sink, Step(1.0))
    assert sink.grads == {}


def test_batches_and_methods_that_cannot_be(model: Decoder) -> None:
    adapter = random_adapter(model, lt.LoraConfig(r=3))
    with pytest.raises(ConfigError, match=r"unknown method 'mespp'; choose mesp, .*'mesp'"):
        lt.gradients(model, adapter, lt.Batch.from_sequences([[1, 2]]), "mespp")
    for sequences, labels, message in (
        ([[1, 2, 3]], [[5, -100, -100]], "no position of this batch carries a label"),
        ([[1], [2]], None, "no position of this batch carries a label"),
        ([[1, 131]], None, "token id 131 is outside the model's vocabulary of 131"),
        ([[1, 2]], [[1, 500]], "token id 500 is outside"),
        ([[1] * 513], None, "a sequence has 513 tokens, and the model has positions for 512"),
    ):
        with pytest.raises(DataError, match=message):
            lt.gradients(model, adapter, lt.Batch.from_sequences(sequences, labels))
    for sequences, labels, message in (
        ([], None, "at least one sequence"),
        ([[1], []], None, "each at least one token"),
        ([[1, 2]], [[1]], r"labels have lengths \[1\], the sequences \[2\]"),
        ([[1, -2]], None, "must not be negative"),
        ([[1, 2]], [[1, -101]], "only where they are -100"),
    ):
        with pytest.raises(DataError, match=message):
            lt.Batch.from_sequences(sequences, labels)


def test_float32_stays_near_float64(odd_model: Callable[..., Path], batch: lt.Batch) -> None:
    """The loss itself, a mean of logarithms of about 5, keeps all of float32's digits."""
    directory = odd_model("llama-biases-llama3")
    losses = []
    for dtype in ("float32", "float64"):
        model = lt.load_model(directory, compute_dtype=dtype)
        adapter = random_adapter(model, lt.LoraConfig(r=3))
        losses.append(lt.gradients(model, adapter, batch).loss)
    assert losses[0] == pytest.approx(losses[1], rel=16 * EPS32)
