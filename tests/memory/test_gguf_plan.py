"""Peaks of steps over GGUF files, predicted and measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from gguf_files import KindOf, all_in, fitting, random_weights, write
from small import environment

import lowtide as lt
from lowtide.command import lowtide_command
from lowtide.model.families import spec_from_config

CONFIG = {
    "model_type": "llama",
    "vocab_size": 3000,
    "hidden_size": 1024,
    "intermediate_size": 2560,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
TOKENS = 192


def mixed(name: str, shape: tuple[int, ...]) -> str:
    """As Q4_K_M is: most matrices in Q4_K, the table and every second down and v in Q6_K."""
    best = name == "token_embd.weight" or name in ("blk.0.ffn_down.weight", "blk.0.attn_v.weight")
    return fitting("Q6_K" if best else "Q4_K", shape[1])


@pytest.mark.parametrize(
    ("name", "kind_of"),
    [("mixed", mixed), ("Q5_1", all_in("Q5_1")), ("F32", all_in("F32"))],
)
def test_a_step_takes_what_is_planned(name: str, kind_of: KindOf, tmp_path: Path) -> None:
    """5% or 4 MB. Of F32, only the rows of q and k are copied, into their order."""
    path = tmp_path / f"{name}.gguf"
    write(path, CONFIG, random_weights(spec_from_config(CONFIG).tensor_shapes()), kind_of)
    settings = {"optimizer": "sgd", "lora_r": 8}
    predicted = lt.plan(model=str(path), max_seq_length=TOKENS, **settings).predicted_peak_bytes
    flags = ["--seq-len", str(TOKENS), "--steps", "2", "--optimizer", "sgd", "--lora-r", "8"]
    done = subprocess.run(
        lowtide_command("bench", "step", "--model", str(path), *flags),
        capture_output=True, text=True, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured = max(step["peak_anon_bytes"] for step in json.loads(done.stdout)["steps"])
    print(f"{name}: predicted {predicted / 1e6:.1f} MB, measured {measured / 1e6:.1f} MB")
    assert abs(predicted - measured) <= max(0.05 * measured, 4e6)
