"""How the next token is chosen, at the ends of the settings' ranges, and when it comes."""

from __future__ import annotations

import pytest
import torch

import lowtide as lt
from lowtide.errors import TrainingError
from lowtide.infer import generate as module
from lowtide.infer.generate import Sampling, generate
from lowtide.model.decoder import Decoder

PROMPT = [3, 1, 4, 1, 5]


def ids(decoder: Decoder, count: int = 12, **sampling: float) -> list[int]:
    return list(generate(decoder, None, PROMPT, count, Sampling(**sampling)))  # type: ignore[arg-type]


@pytest.mark.parametrize("sampling", [{"temperature": 1e-300}, {"temperature": 5.0, "top_p": 1e-9}])
def test_a_vanishing_temperature_or_mass_is_greedy(
    decoder: Decoder, sampling: dict[str, float]
) -> None:
    assert ids(decoder, **sampling) == ids(decoder)


def test_a_huge_temperature_is_uniform(decoder: Decoder) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([5.0, -5.0, 0.0, 100.0], dtype=torch.float64)
    drawn = [module._choose(logits, Sampling(1e12), generator) for _ in range(400)]
    assert min(drawn.count(token) for token in range(4)) > 60


def test_top_p_keeps_the_likeliest_tokens_that_reach_it(decoder: Decoder) -> None:
    logits = torch.log(torch.tensor([0.1, 0.5, 0.15, 0.25], dtype=torch.float64))
    for top_p, expected in ((0.4, {1}), (0.6, {1, 3}), (0.8, {1, 3, 2}), (1.0, {0, 1, 2, 3})):
        generator = torch.Generator().manual_seed(0)
        found = {module._choose(logits, Sampling(1.0, top_p), generator) for _ in range(300)}
        assert found == expected


def test_the_seed_decides(decoder: Decoder) -> None:
    first = ids(decoder, temperature=2.0, seed=1)
    assert first == ids(decoder, temperature=2.0, seed=1)
    assert first != ids(decoder, temperature=2.0, seed=2)
    state = torch.random.get_rng_state()
    torch.manual_seed(99)
    assert first == ids(decoder, temperature=2.0, seed=1)  # torch's own seed plays no part
    torch.random.set_rng_state(state)


def test_tokens_come_one_at_a_time(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[int] = []
    feed = module.Generation.feed

    def counted(self: module.Generation, tokens: list[int], look: None) -> torch.Tensor:
        fed.append(len(tokens))
        return feed(self, tokens, look)

    monkeypatch.setattr(module.Generation, "feed", counted)
    stream = generate(decoder, None, PROMPT, 10)
    next(stream)
    assert fed == [5]
    next(stream)
    assert fed == [5, 1]


@pytest.mark.parametrize("count", [1, 2, 9])
def test_max_tokens_is_the_most(decoder: Decoder, count: int) -> None:
    found = ids(decoder, count, temperature=1.0)
    assert len(found) == count
    assert found == ids(decoder, 9, temperature=1.0)[:count]


def test_stop_ids_end_the_text_and_are_not_part_of_it(decoder: Decoder) -> None:
    whole = ids(decoder, temperature=3.0)
    stop = whole[6]
    expected = whole[: whole.index(stop)]
    sampling = Sampling(temperature=3.0)
    assert list(generate(decoder, None, PROMPT, 12, sampling, {stop})) == expected
    assert list(generate(decoder, None, PROMPT, 12, sampling, {whole[0]})) == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_overflow_are_an_error(
    decoder: Decoder, temperature: float, value: float
) -> None:
    adapter = lt.Adapter.create(decoder, seed=1)
    for name, parameter in adapter.items():
        if ".lora_B." in name:
            parameter.fill_(value)
    with pytest.raises(TrainingError, match="no token can be chosen: the weights or the adapter"):
        list(generate(decoder, adapter, PROMPT, 3, Sampling(temperature)))
