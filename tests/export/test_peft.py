"""Adapters travel to peft and back, and what is not the plain function is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import file_name, hf_logits, hf_model, random_adapter, random_batch, relative
from safetensors.torch import load_file, save_file

import lowtide as lt
from lowtide.errors import AdapterError, ConfigError, OutputError

NAME = "qwen2-gqa3-untied"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SAME = 1e-5  # relative, in float32: rounding leaves about 1e-6


def _ids() -> list[int]:
    return random_batch(131, [40])[0][0]


@pytest.mark.parametrize(
    "config",
    [
        lt.LoraConfig(r=8, lora_alpha=16),
        lt.LoraConfig(r=1, lora_alpha=3.5, target_modules="q_proj,down_proj"),
        lt.LoraConfig(r=64, lora_dropout=0.1, layers_to_transform=(1,)),
        lt.LoraConfig(r=4, target_modules=["self_attn.o_proj", "mlp.up_proj"]),
        lt.LoraConfig(r=4, use_rslora=True),
        lt.LoraConfig(r=4, use_dora=True),
        lt.LoraConfig(
            r=4,
            use_dora=True,
            use_rslora=True,
            lora_dropout=0.1,
            layers_to_transform=(0,),
            rank_pattern={r"layers\.\d+\.mlp\.(gate|up)_proj": 7, "v_proj": 1},
            alpha_pattern={"model.layers.0.self_attn.q_proj": 3, ".*_proj": 11.5},
        ),
    ],
    ids=str,
)
def test_peft_opens_our_adapter(
    config: lt.LoraConfig, odd_model: Callable[..., Path], tmp_path: Path
) -> None:
    from peft import PeftModel

    directory = odd_model(NAME)
    model = lt.load_model(directory)
    adapter = random_adapter(model, config)
    adapter.save(tmp_path / "adapter", base_model=str(directory))
    theirs = PeftModel.from_pretrained(hf_model(directory, torch.float32), tmp_path / "adapter")
    ours = lt.logits(model, adapter, _ids())
    assert relative(ours, hf_logits(theirs.eval(), _ids())) < SAME
    assert relative(ours, lt.logits(model, None, _ids())) > 1000 * SAME
    peft_names = {file_name(n) for n, _ in theirs.named_parameters() if "lora" in n}
    assert peft_names == set(adapter.parameters)
    settings = theirs.peft_config["default"]
    assert (settings.r, settings.lora_alpha) == (config.r, config.lora_alpha)
    assert settings.lora_dropout == config.lora_dropout
    assert (settings.use_dora, settings.use_rslora) == (config.use_dora, config.use_rslora)
    assert settings.rank_pattern == config.rank_pattern
    assert settings.alpha_pattern == config.alpha_pattern
    assert settings.base_model_name_or_path == str(directory)


def test_our_own_file_comes_back_bit_by_bit(odd_model: Callable[..., Path], tmp_path: Path) -> None:
    model = lt.load_model(odd_model(NAME))
    config = lt.LoraConfig(
        r=3, lora_alpha=7.5, lora_dropout=0.25, use_dora=True, use_rslora=True,
        rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 2.5},
    )  # fmt: skip
    adapter = random_adapter(model, config)
    adapter.save(tmp_path)
    again = lt.Adapter.load(tmp_path, model)
    assert list(again.parameters) == list(adapter.parameters)
    assert all(again.parameters[n].equal(p) for n, p in adapter.items())
    assert replace(again.config, target_modules=lt.LoraConfig.target_modules) == config
    assert again.config.lora_dropout == 0.25
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


def _peft_adapter(directory: Path, out: Path, **settings: Any) -> Any:
    """An adapter made, filled and saved by peft; returns the peft model."""
    import peft

    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(hf_model(directory, torch.float32), config).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(out)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        {"r": 1, "lora_alpha": 1, "target_modules": ["q_proj", "v_proj"]},
        {"r": 64, "lora_alpha": 8, "target_modules": ["down_proj"], "lora_dropout": 0.3},
        {"r": 4, "target_modules": ["k_proj", "gate_proj"], "layers_to_transform": [1]},
        {"r": 4, "target_modules": ["k_proj", "gate_proj"], "layers_to_transform": 0},
        {"r": 4, "target_modules": r".*\.(o_proj|up_proj)"},
        {"r": 4, "target_modules": ["self_attn.q_proj"], "init_lora_weights": "gaussian"},
        {"r": 4, "target_modules": "all-linear", "use_rslora": True},
        {"r": 4, "target_modules": "all-linear", "use_dora": True},
        {
            "r": 4,
            "target_modules": ["q_proj", "up_proj", "down_proj"],
            "use_dora": True,
            "use_rslora": True,
            "lora_dropout": 0.2,
            "layers_to_transform": [1],
            "rank_pattern": {"down_proj": 9, r"mlp\..*_proj": 2},  # in PEFT's order: sorted
            "alpha_pattern": {r"^model\.layers\.1\.mlp\.(up|down)_proj": 5, "down_proj": 99},
        },
    ],
    ids=str,
)
def test_we_open_an_adapter_of_peft(
    settings: dict[str, Any], odd_model: Callable[..., Path], tmp_path: Path
) -> None:
    directory = odd_model(NAME)
    theirs = _peft_adapter(directory, tmp_path, **settings)
    model = lt.load_model(directory)
    adapter = lt.Adapter.load(tmp_path, model)
    truth = hf_logits(theirs, _ids())
    assert relative(lt.logits(model, adapter, _ids()), truth) < SAME
    assert relative(lt.logits(model, None, _ids()), truth) > 1000 * SAME
    assert adapter.n_parameters == sum(
        p.numel() for n, p in theirs.named_parameters() if "lora_" in n
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"use_dora": 1}, "use_dora is 1; expected true or false"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'; expected true or false"),
        ({"use_dora": True}, "missing: base_model.model.model.layers.0.self_attn.q_proj.lora_magn"),
        ({"rank_pattern": {"q_proj": 3}}, "q_proj.lora_A.weight is [2, "),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj'] is 0; expected a whole number"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is ['q_proj']; expected values by module"),
        ({"lora_alpha": 10**400}, "expected a positive number, at most 1e+09"),
        ({"alpha_pattern": {"q_proj": "2"}}, "alpha_pattern['q_proj'] is '2'; expected a positive"),
        (
            {"alpha_pattern": {"q_(proj": 2}},
            "alpha_pattern has the key 'q_(proj'; expected the end",
        ),
        ({"bias": "lora_only"}, "bias = 'lora_only'"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = ['lm_head']"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora'"),
        ({"velora_config": {"scale": 2}}, "velora_config = {'scale': 2}"),
        (
            {"target_modules": ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"]},
            "not the same linears in each of the layers [0, 1]",
        ),
        ({"target_modules": ["model.layers.0.mlp.up_proj", "q_proj"]}, "lists 2 modules"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"r": 0}, "lora r is 0"),
        ({"r": "8"}, "lora r is '8'"),
        ({"target_modules": ["q_proj", "lm_head"]}, "the output head is frozen"),
        ({"layers_to_transform": [2]}, "the model has layers 0 to 1"),
        ({"layers_to_transform": "all"}, "layers_to_transform is 'all'"),
    ],
    ids=str,
)
def test_settings_of_another_function_are_refused(
    setting: dict[str, Any], message: str, odd_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = lt.load_model(odd_model(NAME))
    random_adapter(model, lt.LoraConfig(r=2)).save(tmp_path)
    path = tmp_path / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **setting}))
    with pytest.raises(AdapterError) as refusal:
        lt.Adapter.load(tmp_path, model)
    assert message in str(refusal.value)


def test_several_settings_are_refused_together(
    odd_model: Callable[..., Path], tmp_path: Path
) -> None:
    directory = odd_model(NAME)
    _peft_adapter(directory, tmp_path, target_modules=["q_proj"], lora_bias=True, bias="lora_only")
    with pytest.raises(AdapterError, match=r"(?s)bias = 'lora_only'.*lora_bias = True"):
        lt.Adapter.load(tmp_path, lt.load_model(directory))


def test_everything_that_does_not_fit_is_listed_at_once(
    odd_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = lt.load_model(odd_model(NAME))
    random_adapter(model, lt.LoraConfig(r=2, target_modules="q_proj")).save(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    names = list(tensors)
    del tensors[names[0]]
    tensors[names[1]] = torch.zeros(7, 2)
    tensors[names[2]][0, 0] = torch.nan
    tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.zeros(2, 45)
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError) as refusal:
        lt.Adapter.load(tmp_path, model)
    message = str(refusal.value)
    assert f"missing: {names[0]} [2, 45]" in message
    assert f"wrong shape: {names[1]} is [7, 2], the model needs [60, 2]" in message
    assert f"holds values that are not finite numbers: {names[2]}" in message
    assert "not in this model: base_model.model.model.layers.9." in message
    assert "Give the model that it was trained on." in message


def test_an_adapter_for_another_model(odd_model: Callable[..., Path], tmp_path: Path) -> None:
    made_for = lt.load_model(odd_model("qwen2-mqa"))
    random_adapter(made_for, lt.LoraConfig(r=2)).save(tmp_path, base_model="somebody/small")
    with pytest.raises(AdapterError, match="made for 'somebody/small'") as refusal:
        lt.Adapter.load(tmp_path, lt.load_model(odd_model(NAME)))
    assert "wrong shape: " in str(refusal.value)


def test_files_that_are_missing_or_broken(odd_model: Callable[..., Path], tmp_path: Path) -> None:
    model = lt.load_model(odd_model(NAME))
    good = tmp_path / "good"
    random_adapter(model, lt.LoraConfig(r=2)).save(good)

    def refusal(change: Callable[[Path], object]) -> str:
        directory = tmp_path / "bad"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(good, directory)
        change(directory)
        with pytest.raises(AdapterError) as error:
            lt.Adapter.load(directory, model)
        return str(error.value)

    assert "is not a directory" in refusal(lambda d: shutil.rmtree(d))
    assert "has no adapter_config.json" in refusal(lambda d: (d / CONFIG).unlink())
    assert "is not valid JSON" in refusal(lambda d: (d / CONFIG).write_text("{"))
    assert "holds list, not an object" in refusal(lambda d: (d / CONFIG).write_text("[]"))
    assert f"has no {WEIGHTS}" in refusal(lambda d: (d / WEIGHTS).unlink())
    pickled = refusal(lambda d: (d / WEIGHTS).rename(d / "adapter_model.bin"))
    assert "is pickled" in pickled
    assert "safe_serialization=True" in pickled
    whole = (good / WEIGHTS).read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        cut = refusal(lambda d, size=size: (d / WEIGHTS).write_bytes(whole[:size]))
        assert f"({size:,} bytes) cannot be read" in cut
        assert "truncated or corrupt" in cut


def test_a_failed_save_leaves_what_was_there(
    odd_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lt.load_model(odd_model(NAME))
    adapter = random_adapter(model, lt.LoraConfig(r=2))
    adapter.save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lowtide.weights.writer.os.fsync", full)
    for parameter in adapter.parameters.values():
        parameter.zero_()
    with pytest.raises(OutputError, match="No space left on device"):
        adapter.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_directory_that_cannot_be_made(odd_model: Callable[..., Path], tmp_path: Path) -> None:
    adapter = random_adapter(lt.load_model(odd_model(NAME)), lt.LoraConfig(r=2))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made"):
        adapter.save(tmp_path / "file" / "adapter")


def test_a_fresh_dora_adapter_is_pefts_and_changes_nothing(
    odd_model: Callable[..., Path], tmp_path: Path
) -> None:
    directory = odd_model(NAME)
    model = lt.load_model(directory)
    adapter = lt.Adapter.create(model, lt.LoraConfig(r=4, use_dora=True))
    theirs = _peft_adapter(
        directory, tmp_path, r=4, target_modules="all-linear", use_dora=True
    ).state_dict()  # fmt: skip
    for name, parameter in adapter.items():
        if "magnitude" in name:
            start = name.replace("lora_magnitude_vector", "lora_magnitude_vector.default.weight")
            fresh = theirs[name.replace("lora_magnitude_vector", "base_layer.weight")].norm(dim=1)
            assert relative(parameter, fresh) < 1e-6
            assert parameter.shape == theirs[start].shape
    assert relative(lt.logits(model, adapter, _ids()), lt.logits(model, None, _ids())) < SAME


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"q_prj": 2}}, "rank_pattern 'q_prj': matches no adapted linear"),
        (
            {"alpha_pattern": {".*proj": 2, "q_proj": 3}},
            "alpha_pattern 'q_proj': matches no adapted",
        ),
        ({"alpha_pattern": {r"layers\.7\..*": 2}}, "matches no adapted linear"),
        ({"target_modules": "v_proj", "rank_pattern": {"q_proj": 2}}, "rank_pattern 'q_proj'"),
    ],
    ids=str,
)
def test_a_pattern_that_would_be_ignored_is_refused(
    settings: dict[str, Any], message: str, odd_model: Callable[..., Path]
) -> None:
    model = lt.load_model(odd_model(NAME))
    with pytest.raises(ConfigError) as refusal:
        lt.Adapter.create(model, lt.LoraConfig(**settings))
    assert message in str(refusal.value)


def test_dora_refuses_what_it_cannot_do(odd_model: Callable[..., Path], tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(odd_model(NAME), directory)
    config = lt.LoraConfig(use_dora=True)
    with pytest.raises(ConfigError, match=r"use_dora with an adapter in bfloat16.*Keep"):
        lt.Adapter.create(lt.load_model(directory), config, dtype=torch.bfloat16)
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3] = 0.0
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(ConfigError, match=r"row 3 of mlp.up_proj in block 1 is zero. Leave"):
        lt.Adapter.create(lt.load_model(directory), config)
    lt.Adapter.create(lt.load_model(directory), replace(config, target_modules="q_proj"))
