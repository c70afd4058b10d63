"""MeZO's estimates against the exact gradient, and against what theory expects of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import small

import lowtide as lt
from lowtide.bench.quality import gradient_quality
from lowtide.check.run import expected_cosine, filled_adapter
from lowtide.errors import ConfigError
from lowtide.methods import MethodOptions, get_method
from lowtide.model.decoder import Decoder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return lt.load_model(small.write_small_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def adapter(model: Decoder) -> lt.Adapter:
    return filled_adapter(model, lt.LoraConfig(r=4), seed=1)


@pytest.fixture(scope="module")
def batch() -> lt.Batch:
    return lt.Batch.from_sequences([list(range(3, 40)), list(range(100, 120))])


@pytest.fixture(scope="module")
def quality(model: Decoder, adapter: lt.Adapter, batch: lt.Batch) -> dict[str, Any]:
    return gradient_quality(model, adapter, batch, seed=5)


def test_the_document(quality: dict[str, Any], adapter: lt.Adapter) -> None:
    n = adapter.n_parameters
    assert (quality["n_parameters"], quality["directions"]) == (n, [1, 4, 16, 64])
    assert list(quality["overall"]) == ["1", "4", "16", "64"]
    assert [entry["layer"] for entry in quality["layers"]] == [0, 1]
    assert [entry["n_parameters"] for entry in quality["layers"]] == [n // 2, n // 2]
    for entry in quality["layers"]:
        assert list(entry["cosine"]) == ["1", "4", "16", "64"]
    for k in (1, 4, 16, 64):
        assert quality["overall"][str(k)]["expected"] == math.sqrt(k / (n + k + 1))


@pytest.mark.parametrize("k", [16, 64])
def test_the_cosine_is_of_the_size_that_theory_gives(quality: dict[str, Any], k: int) -> None:
    """With s_i = <g, z_i> / |g| standard normal, and n much larger than k, the cosine is
    sqrt(sum s_i^2 / n): the expected sqrt(k / n) times the root of chi^2_k / k, whose standard
    deviation is 1 / sqrt(2 k). Five of these, and 2% for the terms left out.
    """
    found = quality["overall"][str(k)]
    assert found["cosine"] / found["expected"] == pytest.approx(1, abs=5 / math.sqrt(2 * k) + 0.02)


def test_an_estimate_points_along_the_gradient(quality: dict[str, Any]) -> None:
    """Each is (<g, z> z): its cosine is |s| / sqrt(n), never negative."""
    found = quality["overall"]["1"]
    assert 0 <= found["cosine"] < 5 * found["expected"]


def test_it_is_the_mean_of_mezos_estimates(
    model: Decoder, adapter: lt.Adapter, batch: lt.Batch
) -> None:
    exact = lt.gradients(model, adapter, batch, "mesp").grads
    found = gradient_quality(model, adapter, batch, directions=(3, 2), seed=1)
    assert found["directions"] == [2, 3]
    mezo = get_method("mezo", MethodOptions(zo_directions=1))
    total = {name: grad.double() * 0 for name, grad in exact.items()}
    for seed in (3, 4):
        one = lt.gradients(model, adapter, batch, mezo, seed=seed).grads
        total = {name: total[name] + one[name] for name in one}
    for layer, entry in enumerate(found["layers"]):
        names = [name for name in exact if f".layers.{layer}." in name]
        products = [
            sum(float((a[n].double() * b[n].double()).sum()) for n in names)
            for a, b in ((total, exact), (total, total), (exact, exact))
        ]
        by_hand = products[0] / math.sqrt(products[1] * products[2])
        assert entry["cosine"]["2"] == pytest.approx(by_hand, rel=1e-5, abs=1e-9)


def test_two_forwards_for_each_direction_and_no_more(
    model: Decoder, adapter: lt.Adapter, batch: lt.Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowtide.methods.mezo import Mezo

    calls = []
    step = Mezo.step

    def counted(self: Mezo, *given: Any) -> float:
        calls.append(self._directions)
        return step(self, *given)

    monkeypatch.setattr(Mezo, "step", counted)
    gradient_quality(model, adapter, batch, directions=(1, 4, 8))
    assert calls == [1] * 8


def test_another_seed_draws_other_directions(
    model: Decoder, adapter: lt.Adapter, batch: lt.Batch
) -> None:
    first, again, other = (
        gradient_quality(model, adapter, batch, directions=(2,), seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert first["overall"] != other["overall"]


@pytest.mark.parametrize("directions", [(), (0, 4), (-1,)])
def test_directions_that_mean_nothing(
    model: Decoder, adapter: lt.Adapter, batch: lt.Batch, directions: tuple[int, ...]
) -> None:
    with pytest.raises(ConfigError, match="expected numbers of at least 1"):
        gradient_quality(model, adapter, batch, directions=directions)


def test_expected_cosine_of_many_directions_nears_one() -> None:
    assert expected_cosine(1, 4_398_080) == pytest.approx(4.77e-4, rel=1e-3)
    assert expected_cosine(10**9, 10) == pytest.approx(1.0, abs=1e-7)
