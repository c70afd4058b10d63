"""`lowtide info`'s words: what a model is, and where it is unusual."""

from __future__ import annotations

import json

import pytest
from helpers import asset

from lowtide.model.families import FAMILIES, spec_from_config
from lowtide.model.words import in_words


def said(name: str) -> dict[str, str]:
    """Of a real config where there is one, else of a family's first example."""
    if name in FAMILIES:
        return dict(in_words(spec_from_config(FAMILIES[name].examples[0])))
    config = json.loads(asset(f"configs/{name}/config.json").read_text())
    return dict(in_words(spec_from_config(config)))


@pytest.mark.parametrize(
    ("name", "unusual"),
    [
        ("SmolLM2-135M", "nothing"),
        ("Qwen2.5-3B-Instruct", "biases"),
        ("Qwen3-0.6B", "norms on q and k"),
        ("Llama-3.2-1B", "frequencies scaled for long contexts"),
        (
            "gemma-3-1b-it",
            "norms before and after attention and MLP; norms on q and k; norm weights that count "
            "from 1; GeGLU; windows in 22 of 26 layers; 2 rotary bases; factors: embeddings times "
            "33.9411",
        ),
        (
            "phi3",
            "fused linears (qkv_proj, gate_up_proj); heads rotated in part; frequencies scaled for "
            "long contexts",
        ),
        ("olmo2", "norms after attention and MLP, none before; norms on q and k"),
        ("smollm3", "no rotation in 1 of 4 layers"),
        (
            "granite",
            "factors on scores; factors: embeddings times 3.5, branches times 0.22, logits times "
            "0.588235",
        ),
    ],
)
def test_what_is_unusual(name: str, unusual: str) -> None:
    assert said(name)["unusual"] == unusual


def test_a_real_model_line_by_line() -> None:
    assert said("gemma-3-1b-it") == {
        "unusual": said("gemma-3-1b-it")["unusual"],
        "layers": "26 of hidden size 1,152, intermediate size 6,912",
        "attention": "4 heads of 256, 1 of keys and values; 22 layers see the last 512 tokens, "
        "4 all",
        "rotation": "base 1,000,000 in 4 layers; base 10,000 in 22 layers",
        "norms": "RMSNorm before and after attention and MLP, on each head of q and k; weights "
        "count from 1; epsilon 1e-06",
        "mlp": "GeGLU, gelu by tanh",
        "linears": "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj",
        "factors": "embeddings times 33.9411",
        "vocabulary": "262,144 tokens; the head is the embedding",
        "context": "32,768 tokens",
    }


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"rope_type": "linear", "factor": 4}, "all frequencies divided by 4"),
        (
            {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 8192},
            "low frequencies divided by 4 (YaRN, trained up to 8,192 tokens)",
        ),
        (None, "base 1,000,000"),
    ],
)
def test_scaled_frequencies(scaling: object, words: str) -> None:
    config = json.loads(asset("configs/Qwen3-0.6B/config.json").read_text())
    spec = spec_from_config({**config, "rope_scaling": scaling})
    assert dict(in_words(spec))["rotation"].endswith(words)
