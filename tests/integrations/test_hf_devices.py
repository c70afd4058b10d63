"""No GPU is here: what shows is that every tensor is made where the model is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_small import rows, small_model, step, with_lora, worst
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowtide.check.conformance import Example
from lowtide.integrations.hf import arguments, functions, patch
from lowtide.integrations.hf.inner import Inner, read_inner, spec_of
from lowtide.model.families import FAMILIES
from lowtide.model.row_norms import RowNorms
from lowtide.model.workspace import Workspace
from lowtide.ops.cross_entropy import Distribution

NAMES = sorted(FAMILIES)


@pytest.fixture
def _default_device() -> Iterator[None]:
    yield
    torch.set_default_device(None)


@pytest.mark.usefixtures("_default_device")
def test_the_default_device_is_never_used(tmp_path: Path) -> None:
    """What is made without a device is then on `meta`, and does not mix with what has values."""
    model = small_model(tmp_path, torch.float64, use_dora=True, lora_dropout=0.2).train()
    call = rows([12, 7])
    with patch(model):
        torch.manual_seed(3)
        truth = step(model, **call)
        torch.manual_seed(3)
        torch.set_default_device("meta")
        ours = step(model, **call)
    assert ours[0] == truth[0]
    assert worst(ours[1], truth[1]) == 0.0


class _Elsewhere(TorchDispatchMode):
    """Collects the operations that give a tensor of several elements on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.device.type == "cpu" and out.numel() > 1:
            self.found.append(str(func))
        return out


@pytest.mark.parametrize("name", NAMES)
def test_a_step_stays_on_the_models_device(name: str, tmp_path: Path) -> None:
    """On `meta`, where an operation on tensors of two devices fails, as it does on a GPU."""
    example = Example.write(tmp_path, FAMILIES[name].examples[0])
    model = with_lora(example, torch.float32, use_dora=name == "llama").to("meta")
    inner = read_inner(model, spec_of(model.get_base_model()))
    assert inner.adapter is not None
    assert inner.device.type == "meta"
    with _Elsewhere() as seen:
        x, run, dx = _step(inner)
    assert (x.device.type, dx.device.type) == ("meta", "meta")
    assert all(p.grad is not None for p in inner.adapter.trained.values())
    # Frequencies are formed where transformers forms them, and then moved.
    allowed = ("arange", "_to_copy", "div", "pow", "reciprocal", "mul", "where", "rsub", "clamp")
    allowed += ("add", "sub", "lt", "gt", "tensor", "lift_fresh", "detach", "copy")
    assert [name for name in seen.found if not any(part in name for part in allowed)] == []
    del run


def _step(inner: Inner) -> tuple[Tensor, functions.Run, Tensor]:
    """Blocks and loss forward and backward, on tensors without values."""
    spec, device = inner.decoder.spec, inner.device
    tokens = 12
    assert inner.adapter is not None
    places = torch.arange(tokens, device=device)
    own = torch.full_like(places, tokens)
    segments = arguments.self_segments([tokens])
    at = inner.decoder.positions_at(places, segments, own)
    ws = Workspace(spec, tokens, tokens, torch.float32, device=device)
    run = functions.Run(inner, inner.adapter, at, ws, 7, RowNorms(inner.adapter, ws.tile))
    x = torch.zeros(tokens, spec.hidden_size, device=device, requires_grad=True)
    out = functions.blocks(x, run)
    batch = _AllLabelled(places)
    losses, _ = functions.losses_of(out, run, batch, Distribution(tokens, out.detach()))
    losses.sum().backward()
    assert x.grad is not None
    return out, run, x.grad


class _AllLabelled:
    """A batch whose labelled places are known without values."""

    def __init__(self, places: Tensor) -> None:
        self.targets = self.labelled = places
