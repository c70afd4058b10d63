"""DoRA, rsLoRA, ranks, alphas and layers as settings: flags, YAML, refusals, and what is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small
import yaml
from safetensors import safe_open
from test_bad_paths_and_settings import refused

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "dora": (
        {"use_dora": True, "use_rslora": True, "lora_r": 4},
        {"use_dora": True, "use_rslora": True, "r": 4},
        "DoRA r=4, scaled by alpha / sqrt(r) on q_proj",
    ),
    "patterns": (
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 3}, "alpha_pattern": {"o_proj": 5}},
        {
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 3},
            "alpha_pattern": {"o_proj": 5.0},
        },
        r"LoRA r=8, r=2 on q_proj, r=3 on layers\.1\.mlp\..*, alpha=5.0 on o_proj on q_proj",
    ),
    "last layer": (
        {"num_layers": 1},
        {"layers_to_transform": [1]},
        "of 1 of 2 blocks (from 1 to 1)",
    ),
    "one layer": ({"layers_to_transform": [0]}, {"layers_to_transform": [0]}, "of 1 of 2 blocks"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_by_a_yaml_file_and_its_own_run_yaml(
    kind: str, model: Path, data: Path, tmp_path: Path
) -> None:
    given, saved, said = KINDS[kind]
    base = {"model": str(model), "data": str(data), "iters": 2, "max_seq_length": 32}
    config = tmp_path / "run.yaml"
    config.write_text(
        yaml.safe_dump({**base, "adapter_path": str(tmp_path / "a"), **given}, sort_keys=False)
    )
    done = small.run("train", "--config", config)
    assert done.code == 0, done.err
    assert said in done.out
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert {key: written[key] for key in saved} == saved
    again = small.run("train", "--config", tmp_path / "a" / "run.yaml", "--overwrite")
    assert again.code == 0, again.err
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text()) == written
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "pt") as weights:
        names = set(weights.keys())
    assert any("lora_magnitude_vector" in name for name in names) == (kind == "dora")
    generated = small.run(
        "generate", "--model", model, "--adapter-path", tmp_path / "a", "--max-tokens", 2,
        "--prompt", "The",
    )  # fmt: skip
    assert generated.code == 0, generated.err


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--rank-pattern", "q_proj"], ["rank_pattern = 'q_proj'", "q_proj=16", "a whole number"]),
        (["--rank-pattern", "q_proj=1.5"], ["rank_pattern = 'q_proj=1.5'", "a whole number"]),
        (["--rank-pattern", "q_proj=0"], ["rank_pattern['q_proj'] is 0"]),
        (["--rank-pattern", "q_proj=2,q_proj=3"], ["gives 'q_proj' twice"]),
        (["--rank-pattern", "w_proj=2"], ["rank_pattern 'w_proj': matches no adapted linear"]),
        (["--alpha-pattern", "q_proj=nan"], ["alpha_pattern['q_proj'] is nan"]),
        (["--alpha-pattern", "q_(proj=2"], ["has the key 'q_(proj'", "regular expression"]),
        (["--num-layers", "3"], ["--num-layers is 3, and the model has 2 blocks"]),
        (["--num-layers", "0"], ["num_layers = 0: expected at least 1"]),
        (["--layers-to-transform", "2"], ["'2': the model has layers 0 to 1"]),
        (["--layers-to-transform", "1-0"], ["such as 0,4,8-11, and found '1-0'"]),
        (["--layers-to-transform", "last"], ["and found 'last'"]),
        (["--num-layers", "1", "--layers-to-transform", "1"], ["give --num-layers or --layers-to"]),
        (
            ["--use-dora", "--adapter-dtype", "bfloat16"],
            ["--use-dora with --adapter-dtype bfloat16", "0.4%", "Leave --adapter-dtype out"],
        ),
        (["--num-layers", "1", "--keep-blocks", "2"], ["--keep-blocks is 2", "1 block"]),
        (["--neftune-noise-alpha", "0"], ["neftune_noise_alpha = 0.0: expected more than 0"]),
        (["--dora"], ["did you mean '--use-dora'?"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused(
    flags: list[str], parts: list[str], model: Path, data: Path, tmp_path: Path
) -> None:
    base = ("--model", model, "--data", data, "--adapter-path", tmp_path / "a", "--iters", 1)
    refused(small.run("train", *base, "--max-seq-length", 32, *flags), *parts)


def test_a_check_and_a_plan_know_dora(model: Path, data: Path) -> None:
    flags = ("--use-dora", "--use-rslora", "--lora-dropout", 0.1, "--rank-pattern", "q_proj=2")
    short = ("--max-seq-length", 32)
    checked = small.run("check", "--model", model, "--data", data, *short, *flags, "--json")
    assert checked.code == 0, checked.err
    assert checked.document["passed"]
    plain, dora = (
        small.run("plan", "--model", model, *short, *more, "--json").document
        for more in ((), ("--use-dora",))
    )
    assert dora["by_kind"]["row norms"] == 4 * 2 * (32 + 16 + 16 + 32 + 40 + 40 + 32)
    assert plain["by_kind"]["row norms"] == 0
    assert dora["by_kind"]["adapter"] - plain["by_kind"]["adapter"] == dora["by_kind"]["row norms"]
    last = small.run("plan", "--model", model, *short, "--num-layers", 1, "--json").document
    assert last["by_kind"]["adapter"] * 2 == plain["by_kind"]["adapter"]
    assert max(one["settings"]["keep_blocks"] for one in last["alternatives"]) == 1
