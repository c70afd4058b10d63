"""What a GGUF file says of a model: its metadata, the names and rows of its tensors.

That llama.cpp reads it as the same function is shown in tests/export/test_gguf_model.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from lowtide.errors import ModelError
from lowtide.model.families import FAMILIES, spec_from_config
from lowtide.model.gguf.entry import decimal
from lowtide.model.gguf.read import config_from_metadata
from lowtide.model.gguf.tensors import gguf_tensors, row_order
from lowtide.model.gguf.write import GgufModel, gguf_model

CASES = [
    (name, place)
    for name, family in FAMILIES.items()
    if family.gguf is not None
    for place in range(len(family.examples))
]
REFUSED = {
    ("gemma2", 0): "query_pre_attn_scalar = 9",
    ("gemma2", 1): "attn_logit_softcapping = null",
    ("gemma3", 0): "query_pre_attn_scalar = 20",
    ("gemma3_text", 0): "query_pre_attn_scalar = 9",
    ("mistral", 0): "sliding_window = 5",
    ("olmo2", 0): "tie_word_embeddings = True",
    ("olmo2", 1): "attention_bias = True",
    ("phi3", 1): "sliding_window = 9",
    ("qwen2", 0): "head_dim = 6: 5 heads of it are 30 columns, and hidden_size = 45",
    ("qwen2", 1): "head_dim = 10: 6 heads of it are 60 columns, and hidden_size = 54",
    ("qwen3", 1): "attention_bias = True",
    ("smollm3", 1): "sliding_window = 8, no_rope_layers = [0, 1, 0]",
}
"""Examples with what llama.cpp has no word for, and what is said of it."""


def read_again(model: GgufModel, **changed: Any) -> dict[str, Any]:
    """The config.json that a file with this metadata becomes, some keys changed."""
    metadata = dict(model.metadata)
    for name, value in changed.items():
        key = name if name in ("tokens",) else name.replace("__", ".")
        metadata[key] = value
    return config_from_metadata(
        {key: value for key, value in metadata.items() if value is not None},
        shapes_of(model),
        lambda name: model.vectors[name].tolist(),
    )


def shapes_of(model: GgufModel) -> dict[str, tuple[int, ...]]:
    """Of all tensors in the file."""
    vectors = {name: tuple(vector.shape) for name, vector in model.vectors.items()}
    return {one.name: one.shape for one in model.tensors.values()} | vectors


@pytest.mark.parametrize("case", CASES, ids=[f"{name}-{place}" for name, place in CASES])
def test_an_example_comes_back_or_is_refused_by_field(case: tuple[str, int]) -> None:
    config = FAMILIES[case[0]].examples[case[1]]
    if case in REFUSED:
        with pytest.raises(ModelError) as caught:
            gguf_model(config)
        assert REFUSED[case] in str(caught.value)
        assert "Nothing was written" in str(caught.value)
        return
    model = gguf_model(config)
    names = [tensor.name for tensor in model.tensors.values()]
    assert len(set(names)) == len(names)
    spec, again = spec_from_config(config), spec_from_config(read_again(model))
    assert again.tensor_shapes() == spec.tensor_shapes()
    assert gguf_tensors(read_again(model)) == model.tensors


def test_no_case_is_refused_that_is_not_there() -> None:
    assert set(REFUSED) <= set(CASES)


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's own converter writes q and k (LlamaModel.permute)."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


@pytest.mark.parametrize(("heads", "rows"), [(1, 6), (3, 12), (5, 50)])
def test_rows_of_q_and_k_are_those_of_its_converter(heads: int, rows: int) -> None:
    here = np.arange(rows * 2.0).reshape(rows, 2)
    order = row_order(rows, heads)
    assert (torch.tensor(permute(here, heads))[order] == torch.tensor(here)).all()
    assert (permute(here, heads) == here[order.argsort().numpy()]).all()


def llama(**changed: Any) -> dict[str, Any]:
    return read_again(gguf_model(FAMILIES["llama"].examples[0]), **changed)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("llama__block_count", None, "llama.block_count is missing"),
        ("llama__block_count", "two", "llama.block_count = 'two' (expected a number)"),
        ("llama__block_count", 2.5, "llama.block_count = 2.5 (expected a whole number)"),
        ("llama__attention__head_count", [4, 5], "llama.attention.head_count = [4, 5] (expected"),
        ("llama__attention__head_count", 0, "= 0 (expected a number above 0)"),
        ("llama__vocab_size", 132, "token_embd.weight has 131 rows and llama.vocab_size says 132"),
        ("llama__embedding_length", 46, "has 45 columns and llama.embedding_length says 46"),
        ("llama__attention__value_length", 12, "llama.attention.value_length differ"),
        ("llama__rope__scaling__type", "spiral", "llama.rope.scaling.type = 'spiral' (expected"),
        ("llama__rope__dimension_count", 8, "rope_freqs.weight has shape [5] (expected [4])"),
        ("tokenizer__ggml__tokens", ["a"], "131 rows and tokenizer.ggml.tokens 1 tokens"),
        ("general__architecture", None, "does not say its architecture (general.architecture)"),
        ("general__architecture", "mamba", "'mamba'; lowtide knows "),
        ("general__type", "adapter", "of type 'adapter', not a model"),
    ],
)
def test_metadata_that_cannot_be_read_is_named(key: str, value: Any, said: str) -> None:
    if key == "llama__rope__scaling__type":
        plain = gguf_model({**FAMILIES["llama"].examples[1], "rope_scaling": None})
        with pytest.raises(ModelError) as caught:
            read_again(plain, **{key: value})
    else:
        with pytest.raises(ModelError) as caught:
            llama(**{key: value})
    assert said in str(caught.value)


def test_several_problems_are_told_together() -> None:
    with pytest.raises(ModelError) as caught:
        llama(llama__block_count=None, llama__context_length=None)
    assert "llama.block_count is missing" in str(caught.value)
    assert "llama.context_length is missing" in str(caught.value)


def test_a_file_without_an_embedding() -> None:
    model = gguf_model(FAMILIES["llama"].examples[0])
    with pytest.raises(ModelError, match=r"tensor token_embd\.weight is missing"):
        config_from_metadata(model.metadata, {}, lambda name: [])


def test_a_mixture_of_experts_is_refused() -> None:
    model = gguf_model(FAMILIES["llama"].examples[1])
    shapes = {**shapes_of(model), "blk.0.ffn_up_exps.weight": (4, 74, 45)}
    with pytest.raises(ModelError, match="mixture of experts"):
        config_from_metadata(model.metadata, shapes, lambda name: [])


def test_numpys_numbers_are_numbers() -> None:
    config: Mapping[str, Any] = llama(
        llama__block_count=np.uint32(2),
        llama__attention__layer_norm_rms_epsilon=np.float32(1e-5),
        llama__rope__freq_base=float(np.float32(1e6)),
    )
    assert config["num_hidden_layers"] == 2
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-5, 1e6)


@pytest.mark.parametrize("value", [1e-5, 1e-6, 0.1, 1.0, 5e4, 0.21, 1 / 3, 2.5, 0.0078125])
def test_a_float32_is_read_as_what_was_written(value: float) -> None:
    assert decimal(float(np.float32(value))) == pytest.approx(value, rel=6e-8)
    assert np.float32(decimal(float(np.float32(value)))) == np.float32(value)
    if len(str(value)) < 8:
        assert decimal(float(np.float32(value))) == value


ODD = (
    *(None, True, "many", b"x", -1, 0, 2.5, 1e30, 10**12, float("nan"), float("inf")),
    *([], ["a"], [1, 2], {}, np.uint32(7), np.array([1.0, 2.0]), np.float32(0.0)),
)


@pytest.mark.parametrize("case", sorted(set(CASES) - set(REFUSED)))
def test_odd_values_are_read_or_refused(case: tuple[str, int]) -> None:
    """Every key of every example, with every odd value: a spec or a `ModelError`."""
    model = gguf_model(FAMILIES[case[0]].examples[case[1]])
    more = ("general.type", "tokenizer.ggml.tokens", "tokenizer.ggml.eos_token_id")
    scaling = [f"{model.architecture}.rope.scaling.{name}" for name in ("type", "factor")]
    for key in (*model.metadata, *more, *scaling):
        for value in ODD:
            with contextlib.suppress(ModelError):
                config = config_from_metadata(
                    {**model.metadata, key: value},
                    shapes_of(model),
                    lambda name: model.vectors[name].tolist(),
                )
                gguf_tensors(config)
    for name in shapes_of(model):
        for shape in ((), (3,), (10**12, 2), (2, 3, 4)):
            with contextlib.suppress(ModelError):
                shapes = {**shapes_of(model), name: shape}
                spec_from_config(config_from_metadata(model.metadata, shapes, lambda name: [1.0]))


@pytest.mark.parametrize(
    ("key", "value"),
    [("attention.scale", 0.3), ("attention.causal", False), ("rope.scaling.attn_factor", 1.2),
     ("expert_count", 8), ("rope.scaling.yarn_beta_fast", 16.0), ("final_logit_softcapping", 30.0)],
)  # fmt: skip
def test_a_key_that_changes_the_function_is_never_passed_over(key: str, value: Any) -> None:
    model = gguf_model(FAMILIES["qwen3"].examples[0])
    config = read_again(model, **{f"qwen3.{key}": None})
    with pytest.raises(ModelError) as caught:
        read_again(model, **{f"qwen3.{key}": value})
    assert f"qwen3.{key} = {value!r} is not a setting that lowtide knows" in str(caught.value)
    neutral = {"attention.causal": True, "rope.scaling.attn_factor": 1.0,
               "rope.scaling.yarn_beta_fast": 32.0}.get(key, 0.0)  # fmt: skip
    assert read_again(model, **{f"qwen3.{key}": neutral}) == config
