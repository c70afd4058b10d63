"""What a patch changes, what it leaves alone, and how it goes away."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hf_small import grads_of, rows, small_model, step, worst
from torch import nn

import lowtide as lt
from lowtide.check.conformance import relative
from lowtide.errors import ConfigError
from lowtide.integrations.hf import patch, unpatch


def test_lowtide_does_not_import_it() -> None:
    code = (
        "import sys, lowtide, lowtide.integrations.hf;"
        "print([n for n in ('transformers', 'peft', 'trl', 'accelerate') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    code = "import sys, lowtide; print('lowtide.integrations' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_unpatch_gives_the_same_bits_as_before(tmp_path: Path) -> None:
    model = small_model(tmp_path)
    call = rows([12, 7])
    before, attributes = step(model, **call), set(vars(model))
    logits = model(**call).logits
    handle = patch(model)
    step(model, **call)
    handle.unpatch()
    handle.unpatch()
    after = step(model, **call)
    assert before[0] == after[0]
    assert all(torch.equal(grad, after[1][name]) for name, grad in before[1].items())
    assert torch.equal(model(**call).logits, logits)
    assert set(vars(model)) == attributes
    assert handle._ws is None


def test_logits_and_generation_come_as_before(tmp_path: Path) -> None:
    model = small_model(tmp_path)
    call = rows([12, 7])
    labels = call.pop("labels")
    before = model(**call).logits
    text = model.generate(call["input_ids"][:, :4], max_new_tokens=8, do_sample=False)
    with patch(model):
        assert torch.equal(model(**call).logits, before)
        again = model.generate(call["input_ids"][:, :4], max_new_tokens=8, do_sample=False)
        assert torch.equal(again, text)
        with model.disable_adapter(), torch.no_grad():
            base = model(**call, labels=labels)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(base.logits, model(**call, labels=labels).logits)


def test_logits_beside_a_loss_are_formed_when_they_are_used(tmp_path: Path) -> None:
    model = small_model(tmp_path)
    call = rows([12, 7])
    truth = model(**call).logits
    with patch(model), torch.no_grad():
        out = model(**call)
        calls = _count_calls(model.get_base_model())
        assert (out.logits.shape, out.logits.dtype) == (truth.shape, torch.float32)
        assert (out.logits.device, len(out.logits)) == (truth.device, 2)
        assert calls == []
        assert torch.equal(out.logits.detach(), truth)
        assert torch.equal(torch.argmax(out.logits, -1), truth.argmax(-1))
        assert torch.equal(out.logits[..., :3], truth[..., :3])
        assert calls == [1]
        assert out[0] is out.loss
        assert list(out) == ["loss", "logits"]


def _count_calls(module: nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_one_call_frees_what_it_took_and_the_workspace_is_reused(tmp_path: Path) -> None:
    model = small_model(tmp_path)
    with patch(model) as handle:
        step(model, **rows([12, 7]))
        first = handle._ws
        step(model, **rows([5, 3]))
        assert handle._ws is first
        step(model, **rows([30]))
        grown = handle._ws
        assert grown is not None
        assert (grown.max_tokens, grown.max_length) == (30, 30)


def test_two_patched_models_side_by_side(tmp_path: Path) -> None:
    one = small_model(tmp_path / "one", torch.float64)
    other = small_model(tmp_path / "other", torch.float64, r=5)
    call, small = rows([12, 7]), rows([3])
    truth = [step(one, **call), step(other, **small)]
    with patch(one), patch(other):
        one.zero_grad()
        other.zero_grad()
        losses = [one(**call).loss, other(**small).loss]  # both forwards, then both backwards
        for loss in losses:
            loss.backward()
        ours = [grads_of(one), grads_of(other)]
    assert max(worst(g, true) for g, (_, true) in zip(ours, truth, strict=True)) < 1e-5


def _through_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def _through_torch(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _through_pickle, _through_torch])
def test_a_copy_is_patched_by_itself(copied: Callable[[Any], Any], tmp_path: Path) -> None:
    model = small_model(tmp_path)
    call = rows([12, 7])
    before = step(model, **call)
    handle = patch(model)
    ours = step(model, **call)
    other = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    found = step(other, **call)
    assert found[0] == ours[0]
    assert worst(found[1], ours[1]) == 0.0
    handle.unpatch()
    assert step(other, **call)[0] == ours[0]
    unpatch(other)
    unpatch(other)
    assert step(other, **call)[0] == before[0]


def test_files_are_pefts_and_open_in_lowtide(tmp_path: Path) -> None:
    model = small_model(tmp_path / "base")
    call = rows([12])
    truth = model(**call).logits[0]
    with patch(model):
        step(model, **call)
        model.save_pretrained(tmp_path / "adapter")
        assert set(model.state_dict()) == set(copy.deepcopy(model).state_dict())
    base = model.unload()
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(again(**call).logits[0], truth)
    decoder = lt.load_model(tmp_path / "base")
    adapter = lt.Adapter.load(tmp_path / "adapter", decoder)
    found = lt.logits(decoder, adapter, call["input_ids"][0].tolist())
    assert relative(found, truth) < 1e-5


def test_an_exception_leaves_the_model_usable(tmp_path: Path) -> None:
    model = small_model(tmp_path)
    call = rows([12, 7])
    with patch(model):
        ours = step(model, **call)
        with pytest.raises(IndexError):
            model(**{**call, "input_ids": call["input_ids"] + 1000})
        with pytest.raises(IndexError):
            model(**{**call, "labels": call["labels"] + 1000 * (call["labels"] > 0)})
        with pytest.raises(ZeroDivisionError):
            _interrupted(model, call)
        again = step(model, **call)
    assert ours[0] == again[0]
    assert worst(again[1], ours[1]) == 0.0


def _interrupted(model: Any, call: dict[str, torch.Tensor]) -> None:
    def fail(_: torch.Tensor) -> None:
        raise ZeroDivisionError

    handle = next(p for p in model.parameters() if p.requires_grad).register_hook(fail)
    try:
        model(**call).loss.backward()
    finally:
        handle.remove()


def test_parameters_that_change_before_the_backward_are_seen(tmp_path: Path) -> None:
    model = small_model(tmp_path)
    with patch(model):
        loss = model(**rows([5])).loss
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_what_moves_or_changes_after_the_patch_is_seen(tmp_path: Path) -> None:
    model = small_model(tmp_path)
    call = rows([12, 7])
    with patch(model):
        step(model, **call)
        model.double()
        wide = step(model, **call)
        with torch.no_grad():
            model.get_base_model().model.norm.weight.mul_(2.0)
        scaled = step(model, **call)
    assert {grad.dtype for grad in wide[1].values()} == {torch.float64}
    truth = step(model, **call)
    assert scaled[0] == pytest.approx(truth[0], rel=1e-5)
    assert worst(scaled[1], truth[1]) < 1e-5


def test_checkpointing_flags_do_no_work_twice(tmp_path: Path) -> None:
    model = small_model(tmp_path).train()
    call = rows([12, 7])
    with patch(model):
        plain = step(model, **call)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        layer_calls = _count_calls(model.get_base_model().model.norm)
        with pytest.raises(ConfigError, match="norm has a hook"):
            model(**call)
        model.get_base_model().model.norm._forward_pre_hooks.clear()
        flagged = step(model, **call)
    assert layer_calls == []
    assert plain[0] == flagged[0]
    assert worst(flagged[1], plain[1]) == 0.0
