"""Every exact method and option gives autograd's gradients."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import EPS32, random_adapter, random_batch, relative

import lowtide as lt
from lowtide.errors import ConfigError, LowtideWarning, OutputError
from lowtide.methods import METHODS, MethodOptions, get_method
from lowtide.methods.options import OPTIONS_OF

MODELS = ("qwen2-mqa", "qwen2-gqa3-untied", "llama-biases-llama3", "llama-many-tiles")
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "mesp": ("mesp", {}),
    "mesp, stored h": ("mesp", {"recompute_h": False}),
    "mesp, inputs in a file": ("mesp", {"block_inputs": "file"}),
    "mesp, one block kept": ("mesp", {"keep_blocks": 1}),
    "mesp, all kept, h too": ("mesp", {"keep_blocks": 2, "recompute_h": False}),
    "mesp, small tiles": ("mesp", {"tiles": "quarter", "keep_blocks": 1}),
    "mebp": ("mebp", {}),
    "mebp, full logits": ("mebp", {"mebp_loss": "full"}),
    "mebp, inputs in a file": ("mebp", {"block_inputs": "file"}),
}


def test_every_exact_method_is_here() -> None:
    exact = {name for name, make in METHODS.items() if make(MethodOptions()).exact}
    assert exact == {name for name, _ in WAYS.values()} | {"autograd"}
    assert set(OPTIONS_OF) == set(METHODS)


@pytest.mark.parametrize("shape", MODELS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_autograds(
    way: str, shape: str, dropout: float, odd_model: Callable[..., Path]
) -> None:
    model = lt.load_model(odd_model(shape), compute_dtype="float64")
    adapter = random_adapter(model, lt.LoraConfig(r=3, lora_dropout=dropout))
    batch = lt.Batch.from_sequences(*random_batch(131, [23, 1, 9, 31], masked=0.4))
    name, options = WAYS[way]
    method = get_method(name, MethodOptions(**options))
    truth = lt.gradients(model, adapter, batch, "autograd", dropout_seed=7)
    for _ in range(2):  # the second step finds the buffers of the first
        ours = lt.gradients(model, adapter, batch, method, dropout_seed=7)
        assert ours.loss == pytest.approx(truth.loss, rel=1e-12)
        assert max(relative(ours.grads[n], g) for n, g in truth.grads.items()) < 1e-12


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("method", "options"),
    [*WAYS.values(), ("autograd", {}), ("lcsb", {}), ("mezo", {"zo_directions": 2})],
)
def test_a_rounded_adapter_has_the_gradients_of_its_values(
    method: str, options: dict[str, Any], dropout: float, odd_model: Callable[..., Path]
) -> None:
    """To the bit those of a float32 adapter that holds the same numbers, and not less exact."""
    model = lt.load_model(odd_model("llama-biases-llama3"))
    config = lt.LoraConfig(r=3, lora_dropout=dropout)
    rounded = lt.Adapter.create(model, config, 1, torch.bfloat16)
    for name, parameter in random_adapter(model, config).items():
        rounded.parameters[name].copy_(parameter)
    wide = lt.Adapter(config, {name: p.float() for name, p in rounded.items()})
    batch = lt.Batch.from_sequences(*random_batch(131, [23, 1, 9, 31], masked=0.4))
    ours, same = (
        lt.gradients(
            model, a, batch, get_method(method, MethodOptions(**options)), dropout_seed=7, seed=3
        )
        for a in (rounded, wide)
    )
    assert ours.loss == same.loss
    assert set(ours.grads) == set(same.grads)
    for name, grad in ours.grads.items():
        assert grad.dtype == torch.float32
        assert torch.equal(grad, same.grads[name])


@pytest.mark.parametrize("way", WAYS)
def test_float32_is_as_near_the_truth_as_autograd_is(
    way: str, odd_model: Callable[..., Path]
) -> None:
    """The noise-floor rule over all gradients in one vector, with 16 eps to spare."""
    directory = odd_model("qwen2-gqa3-untied")
    models = [lt.load_model(directory, compute_dtype=d) for d in ("float64", "float32")]
    batch = lt.Batch.from_sequences(*random_batch(131, [23, 9], masked=0.4))
    config = lt.LoraConfig(r=8)
    name, options = WAYS[way]
    method = get_method(name, MethodOptions(**options))
    small = random_adapter(models[1], config)
    wide = lt.Adapter(config, {n: p.double() for n, p in small.items()})
    truth, ours, naive = (
        torch.cat([g.double().flatten() for g in lt.gradients(*parts).grads.values()])
        for parts in (
            (models[0], wide, batch, "autograd"),
            (models[1], small, batch, method),
            (models[1], small, batch, "autograd"),
        )
    )
    assert relative(ours, truth) <= 2 * relative(naive, truth) + 16 * EPS32


@pytest.mark.parametrize("name", ["mesp", "mebp"])
def test_a_growing_batch_finds_room_for_what_is_stored(
    name: str, odd_model: Callable[..., Path]
) -> None:
    model = lt.load_model(odd_model("qwen2-mqa"), compute_dtype="float64")
    adapter = random_adapter(model, lt.LoraConfig(r=3))
    given = {"recompute_h": False} if name == "mesp" else {"block_inputs": "file"}
    method = get_method(name, MethodOptions(**given))  # type: ignore[arg-type]
    for lengths in ([5], [40, 3], [2], [64]):
        batch = lt.Batch.from_sequences(*random_batch(131, lengths, seed=len(lengths)))
        ours = lt.gradients(model, adapter, batch, method)
        truth = lt.gradients(model, adapter, batch, "autograd")
        flat = [torch.cat([g.flatten() for g in o.grads.values()]) for o in (ours, truth)]
        assert relative(*flat) < 1e-12


def test_an_option_of_another_method_is_refused() -> None:
    for method, option in itertools.product(METHODS, ("recompute_h", "mebp_loss", "zo_eps")):
        given = {"recompute_h": False, "mebp_loss": "full", "zo_eps": 0.1}[option]
        options = MethodOptions(**{option: given})  # type: ignore[arg-type]
        if option in OPTIONS_OF[method]:
            get_method(method, options)
        else:
            with pytest.raises(ConfigError, match=f"--{option.replace('_', '-')} belongs to m"):
                get_method(method, options)


def test_a_scratch_file_that_cannot_be_is_told(
    odd_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lt.load_model(odd_model("qwen2-mqa"))
    adapter = random_adapter(model, lt.LoraConfig(r=3))
    batch = lt.Batch.from_sequences([[1, 2, 3]])
    method = get_method("mebp", MethodOptions(block_inputs="file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(OutputError, match="no scratch file for block inputs can be made"):
        lt.gradients(model, adapter, batch, method)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OutputError, match=r"need .* MB of disk at .*: No space left on device"):
        lt.gradients(model, adapter, batch, method)
    assert list(tmp_path.iterdir()) == []


def test_a_scratch_directory_is_used_and_left_empty(
    odd_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lt.load_model(odd_model("qwen2-mqa"))
    made: list[Path] = []
    make = tempfile.mkstemp

    def watched(*args: object, **given: object) -> tuple[int, str]:
        descriptor, path = make(*args, **given)  # type: ignore[call-overload]
        made.append(Path(path))
        return descriptor, path

    monkeypatch.setattr("tempfile.mkstemp", watched)
    options = MethodOptions(block_inputs="file", scratch_dir=str(tmp_path))
    adapter = random_adapter(model, lt.LoraConfig(r=3))
    lt.gradients(model, adapter, lt.Batch.from_sequences([[1, 2, 3]]), get_method("mesp", options))
    assert [path.parent for path in made] == [tmp_path]
    assert list(tmp_path.iterdir()) == []


def test_a_scratch_directory_in_memory_is_told(
    odd_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = lt.load_model(odd_model("qwen2-mqa"))
    adapter = random_adapter(model, lt.LoraConfig(r=3))
    monkeypatch.setattr("lowtide.methods.buffers.is_memory", lambda directory: True)
    options = MethodOptions(block_inputs="file", scratch_dir=str(tmp_path))
    with pytest.warns(LowtideWarning, match=f"{tmp_path} is on tmpfs, which is memory"):
        lt.gradients(
            model, adapter, lt.Batch.from_sequences([[1, 2, 3]]), get_method("mesp", options)
        )


def test_a_scratch_directory_without_a_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="--scratch-dir is for --block-inputs file"):
        get_method("mesp", MethodOptions(scratch_dir="/tmp"))
