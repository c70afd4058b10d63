"""Fails when a step of `mesp` makes anything of a size that the method does without.

Every operation of a step is watched for storage that it allocates, the workspace's buffers among
them. `autograd`, which keeps everything, trips each guard: so each of them can.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import random_adapter, random_batch, write_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lowtide as lt
from lowtide.methods import Step, get_method
from lowtide.model.batch import Batch
from lowtide.model.decoder import Decoder

# So chosen that T < I < V, that T x T is larger than every buffer that the step may have, and that
# all limits are far apart.
TOKENS, HIDDEN, INNER, VOCAB, HEADS = 2048, 64, 4096, 8192, 2
SHAPE = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "vocab_size": VOCAB,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": TOKENS,
    "tie_word_embeddings": False,
}
SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def _storages(values: Any) -> dict[int, Tensor]:
    """Tensors among the values by the address of their storage."""
    tensors = (value for value in tree_leaves(values) if isinstance(value, Tensor))
    return {t.untyped_storage().data_ptr(): t for t in tensors if t.untyped_storage().nbytes()}


class Watch(TorchDispatchMode):
    """Records what each operation allocates, and what it widens out of 16 bit."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[tuple[int, str]] = []
        self.widened: list[tuple[int, str]] = []
        self.copied16: list[tuple[int, str]] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        given = _storages((args, kwargs))
        has16 = any(t.dtype in SIXTEEN_BIT for t in tree_leaves((args, kwargs)) if _is_tensor(t))
        out = func(*args, **kwargs)
        for address, tensor in _storages(out).items():
            what = f"{func} -> {tensor.dtype} {list(tensor.shape)}"
            if address not in given:
                elements = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.allocated.append((elements, what))
                if tensor.dtype in SIXTEEN_BIT:
                    self.copied16.append((elements, what))
            if has16 and tensor.dtype not in SIXTEEN_BIT and tensor.is_floating_point():
                self.widened.append((tensor.numel(), what))
        return out


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _between(found: list[tuple[int, str]], low: float, high: float) -> list[str]:
    return [what for elements, what in found if low <= elements < high]


# The widest tile that a step may hold in the compute dtype: mlp_tile_width gives 320 columns here,
# and the step has room for two such tiles.
TILE = 2 * 320 * HIDDEN
GUARDS: dict[str, Callable[[Watch], list[str]]] = {
    "logits (T, V)": lambda w: _between(w.allocated, TOKENS * VOCAB, math.inf),
    "activation (T, I)": lambda w: _between(w.allocated, TOKENS * INNER, TOKENS * VOCAB),
    "scores (T, T)": lambda w: _between(w.allocated, TOKENS * TOKENS, TOKENS * INNER),
    "a wide copy of a weight": lambda w: _between(w.widened, TILE + 1, math.inf),
    "a second copy of a weight": lambda w: _between(w.copied16, TILE + 1, math.inf),
}


class _Drop:
    def add(self, name: str, grad: Tensor) -> None:
        """Forget it."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    directory = write_model(tmp_path_factory.mktemp("guarded"), SHAPE, torch.bfloat16)
    model = lt.load_model(directory)
    assert model.stored_dtypes == ["bfloat16"]
    return model


@pytest.fixture(scope="module")
def batch() -> Batch:
    return lt.Batch.from_sequences(*random_batch(VOCAB, [TOKENS]))


def _watch(model: Decoder, batch: Batch, method: str, **config: Any) -> Watch:
    adapter = random_adapter(model, lt.LoraConfig(r=4, **config))
    with Watch() as watch:
        step = Step(1.0 / batch.n_tokens, dropout_seed=1)
        get_method(method).step(model, adapter, batch, _Drop(), step)
    return watch


@pytest.fixture(scope="module")
def mesp(model: Decoder, batch: Batch) -> Watch:
    """The first step, which allocates the buffers too, with dropout on."""
    return _watch(model, batch, "mesp", lora_dropout=0.1)


@pytest.fixture(scope="module")
def autograd(model: Decoder, batch: Batch) -> Watch:
    return _watch(model, batch, "autograd")


@pytest.mark.parametrize("guard", GUARDS)
def test_mesp_makes_no(guard: str, mesp: Watch) -> None:
    assert len(mesp.allocated) > 100
    assert len(mesp.widened) > 100
    assert GUARDS[guard](mesp) == []


@pytest.mark.parametrize("guard", [name for name in GUARDS if "second" not in name])
def test_autograd_trips_the_guard_against(guard: str, autograd: Watch) -> None:
    assert GUARDS[guard](autograd)


def test_a_copied_weight_trips_its_guard(model: Decoder) -> None:
    with Watch() as watch:
        model.linears[0]["mlp.gate_proj"].weight.whole().clone()
    assert GUARDS["a second copy of a weight"](watch)


def test_a_wider_mlp_tile_trips_the_guard(
    model: Decoder, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowtide.model.workspace.mlp_tile_width", lambda *_: INNER)
    watch = _watch(model, batch, "mesp")
    assert _between(watch.allocated, TOKENS * INNER, math.inf)
    assert GUARDS["a wide copy of a weight"](watch)


def test_everything_at_once_stays_small(mesp: Watch) -> None:
    """Largest single allocation: buffers grow with T, never with T x V, T x I or T x T."""
    largest, what = max(mesp.allocated)
    # Four activation tiles of 320 columns each, in one buffer.
    assert largest <= 4 * 320 * TOKENS, what


def test_a_second_step_makes_no_buffer_again(model: Decoder, batch: Batch) -> None:
    method, adapter = get_method("mesp"), random_adapter(model, lt.LoraConfig(r=4))
    step = Step(1.0 / batch.n_tokens)
    method.step(model, adapter, batch, _Drop(), step)
    with Watch() as watch:
        method.step(model, adapter, batch, _Drop(), step)
    # What is left are small things: a product of a score tile, gradients of one matrix.
    largest, what = max(watch.allocated)
    assert largest <= TOKENS * HIDDEN, what
