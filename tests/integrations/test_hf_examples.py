"""The example programs, as a user starts them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import small
from helpers import asset

import lowtide as lt

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize("name", ["trl_sft.py", "hf_trainer.py"])
def test_an_example_trains_an_adapter(name: str, tmp_path: Path) -> None:
    model = asset("models/stories260K/hf-llama")
    rows = [{"prompt": f"Dog {i} said", "completion": "hello to the cat."} for i in range(24)]
    data, output = small.write_jsonl(tmp_path / "data.jsonl", rows), tmp_path / "adapter"
    command = [
        *(sys.executable, str(EXAMPLES / name), "--model", str(model), "--data", str(data)),
        *("--output", str(output), "--steps", "4", "--max-length", "48"),
    ]
    environment = small.environment(HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE="1")
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    adapter = lt.Adapter.load(output, lt.load_model(model))
    moved = [float(p.abs().sum()) for key, p in adapter.items() if ".lora_B." in key]
    assert min(moved) > 0.0
