"""Generation: a real model's golden text, and a cache that changes no logit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import asset, random_adapter, random_batch, relative

import lowtide as lt
from lowtide.data.decoding import decode_stream
from lowtide.data.tokenizer import Tokenizer
from lowtide.errors import ConfigError, DataError
from lowtide.infer.generate import Generation, Sampling


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("twin", ["hf-llama", "hf-qwen2-zero-bias"])
def test_two_hundred_greedy_steps_print_the_golden_text(twin: str, dtype: str) -> None:
    model = lt.load_model(asset(f"models/stories260K/{twin}"), compute_dtype=dtype)
    tokenizer = Tokenizer.load(asset("models/stories260K/hf-llama"))
    golden = asset("models/stories260K/golden_greedy_200.txt").read_text(encoding="utf-8")
    assert tokenizer.bos_id is not None
    ids = list(lt.generate(model, None, [tokenizer.bos_id], 200))
    assert len(ids) == 200
    assert tokenizer.decode([tokenizer.bos_id, *ids]) == golden
    assert "".join(decode_stream(tokenizer, [tokenizer.bos_id, *ids])) == golden


@pytest.mark.parametrize("cut", [1, 2, 7, 40])
@pytest.mark.parametrize("name", ["qwen2-mqa", "qwen2-gqa3-untied", "llama-biases-llama3"])
def test_the_cache_changes_no_logit(name: str, cut: int, odd_model: Callable[..., Path]) -> None:
    model = lt.load_model(odd_model(name), compute_dtype="float64")
    adapter = random_adapter(model, lt.LoraConfig(r=3, lora_dropout=0.5))
    ids = random_batch(model.spec.vocab_size, [43])[0][0]
    whole = lt.logits(model, adapter, ids)
    generation = Generation(model, adapter, capacity=len(ids))
    assert relative(generation.feed(ids[:cut]), whole[cut - 1]) < 1e-12
    for place in range(cut, len(ids)):
        assert relative(generation.feed([ids[place]]), whole[place]) < 1e-12


def test_a_prompt_longer_than_one_chunk(odd_model: Callable[..., Path]) -> None:
    model = lt.load_model(odd_model("qwen2-gqa3-untied"), compute_dtype="float64")
    ids = random_batch(model.spec.vocab_size, [512])[0][0]
    whole = lt.logits(model, None, ids)
    for length in (255, 256, 257, 511, 512):
        logits = Generation(model, None, capacity=length).feed(ids[:length])
        assert relative(logits, whole[length - 1]) < 1e-12


def test_generation_stops_where_positions_end(odd_model: Callable[..., Path]) -> None:
    model = lt.load_model(odd_model("qwen2-mqa"))
    prompt = random_batch(model.spec.vocab_size, [510])[0][0]
    # 512 positions: two more tokens are read, and the third needs no position of its own.
    assert len(list(lt.generate(model, None, prompt, 50))) == 3
    with pytest.raises(DataError, match=r"513 tokens, and the model has positions for 512"):
        list(lt.generate(model, None, [*prompt, 1, 2, 3], 1))


def test_greedy_follows_the_logits_and_stop_ids_end_it(odd_model: Callable[..., Path]) -> None:
    model = lt.load_model(odd_model("qwen2-gqa3-untied"))
    ids = list(lt.generate(model, None, [5, 9], 12))
    sequence = [5, 9, *ids]
    greedy = lt.logits(model, None, sequence).argmax(-1)
    assert greedy[1:-1].tolist() == ids
    stop = ids[6]
    kept = list(lt.generate(model, None, [5, 9], 12, stop_ids={stop}))
    assert kept == ids[: ids.index(stop)]


def test_sampling_follows_the_softmax_and_its_seed(odd_model: Callable[..., Path]) -> None:
    model = lt.load_model(odd_model("qwen2-mqa"))
    prompt = [3, 1, 4]

    def first(temperature: float, top_p: float, seed: int) -> int:
        return next(lt.generate(model, None, prompt, 1, Sampling(temperature, top_p, seed)))

    assert [first(1.0, 1.0, 7) for _ in range(3)] == [first(1.0, 1.0, 7)] * 3
    probabilities = (lt.logits(model, None, prompt)[-1].double() / 0.7).softmax(-1)
    draws = torch.tensor([first(0.7, 1.0, seed) for seed in range(300)])
    counts = torch.bincount(draws, minlength=len(probabilities)).double()
    expected = 300 * probabilities
    # Five sigma of a binomial for each token, and one count for the rare ones.
    assert bool(((counts - expected).abs() <= 5 * expected.sqrt() + 1).all())

    order = probabilities.argsort(descending=True)
    mass = probabilities[order].cumsum(0)
    allowed = set(order[: int((mass < 0.5).sum()) + 1].tolist())
    drawn = {first(0.7, 0.5, seed) for seed in range(100)}
    assert drawn <= allowed
    assert first(1.0, 1e-9, 3) == int(order[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; expected 0 or more"),
        ({"top_p": 0.0}, "top_p is 0.0; expected 0 < top_p <= 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_sampling_out_of_range(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "the prompt has no token"), ([131], "token id 131 is outside the model's vocabulary")],
)
def test_prompts_that_the_model_cannot_take(
    prompt: list[int], message: str, odd_model: Callable[..., Path]
) -> None:
    model = lt.load_model(odd_model("qwen2-mqa"))
    with pytest.raises(DataError, match=message):
        list(lt.generate(model, None, prompt, 1))
