"""NEFTune's noise: its formula, the same in every method and whenever a block embeds again."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_adapter, random_batch, relative
from test_exact_methods import WAYS

import lowtide as lt
from lowtide.methods import MethodOptions, get_method
from lowtide.methods.mezo import Direction
from lowtide.model.forward import embed, embed_batch
from lowtide.model.neftune import Noise

LENGTHS = [23, 1, 9, 31]


def _batch() -> lt.Batch:
    return lt.Batch.from_sequences(*random_batch(131, LENGTHS, masked=0.4))


def test_the_noise_is_uniform_within_alpha_over_the_root_of_tokens_times_width(
    odd_model: Callable[..., Path],
) -> None:
    model = lt.load_model(odd_model("llama-many-tiles"), compute_dtype="float64")
    lengths, alpha, width = (400, 1, 150), 7.0, model.spec.hidden_size
    noise = Noise(alpha, 5).add_(torch.zeros(551, width, dtype=torch.float64), lengths, model.spec)
    for part, length in zip(torch.split(noise, lengths), lengths, strict=True):
        bound = alpha / math.sqrt(length * width)
        values = part.flatten() / bound
        assert float(values.abs().max()) <= 1.0
        # Of n uniform values: the mean is within 5 / sqrt(3 n) of 0, and the largest distance of
        # their distribution from the uniform one within 2.5 / sqrt(n), both far less often missed
        # than once in 10,000.
        n = len(values)
        assert abs(float(values.mean())) < 5 / math.sqrt(3 * n)
        place = torch.arange(1, n + 1, dtype=torch.float64) / n
        assert float((values.sort().values / 2 + 0.5 - place).abs().max()) < 2.5 / math.sqrt(n)
    neighbours = torch.corrcoef(torch.stack([noise[:399].flatten(), noise[1:400].flatten()]))
    assert abs(float(neighbours[0, 1])) < 5 / math.sqrt(399 * width)


def test_it_is_what_transformers_hook_adds(odd_model: Callable[..., Path]) -> None:
    """The hook's rule on one sequence, with its uniform draw replaced by the largest value."""
    from transformers.integrations.neftune import neftune_post_forward_hook

    model = lt.load_model(odd_model("qwen2-mqa"), compute_dtype="float64")
    tokens, alpha = 29, 5.0
    module = torch.nn.Embedding(3, model.spec.hidden_size)
    module.neftune_noise_alpha = alpha  # type: ignore[assignment]
    zeros = torch.zeros(1, 200 * tokens, model.spec.hidden_size)
    theirs = neftune_post_forward_hook(module.train(), (), zeros[:, :tokens])
    ours = Noise(alpha, 1).add_(torch.zeros_like(zeros[0, :tokens]), [tokens], model.spec)
    bound = alpha / math.sqrt(tokens * model.spec.hidden_size)
    for noise in (ours, theirs[0]):
        assert 0.98 * bound < float(noise.abs().max()) <= bound * (1 + 1e-6)


def test_noise_comes_before_a_factor_of_the_embedding(odd_model: Callable[..., Path]) -> None:
    model = lt.load_model(odd_model("qwen2-mqa"), compute_dtype="float64")
    zeros = torch.zeros(7, model.spec.hidden_size, dtype=torch.float64)
    plain = Noise(5.0, 1).add_(zeros.clone(), [7], model.spec)
    scaled = type(model.spec)(**{**vars(model.spec), "noise_scale": 12.0})
    assert relative(Noise(5.0, 1).add_(zeros.clone(), [7], scaled), 12 * plain) < 1e-12


@pytest.mark.parametrize("way", WAYS)
def test_every_exact_way_gives_autograds_gradients(
    way: str, odd_model: Callable[..., Path]
) -> None:
    model = lt.load_model(odd_model("llama-many-tiles"), compute_dtype="float64")
    adapter = random_adapter(model, lt.LoraConfig(r=3, lora_dropout=0.2))
    name, options = WAYS[way]

    def gradients(method: Any, alpha: float | None, seed: int = 4) -> lt.methods.Gradients:
        return lt.gradients(
            model, adapter, _batch(), method, dropout_seed=7, seed=seed, neftune_noise_alpha=alpha
        )

    truth = gradients("autograd", 5.0)
    method = get_method(name, MethodOptions(**options))
    for _ in range(2):
        ours = gradients(method, 5.0)
        assert ours.loss == pytest.approx(truth.loss, rel=1e-12)
        assert max(relative(ours.grads[n], g) for n, g in truth.grads.items()) < 1e-12
    assert gradients(method, None).loss != truth.loss
    assert gradients(method, 5.0, seed=5).loss != truth.loss
    # An evaluation between steps has none.
    assert method.loss(model, adapter, _batch()) == pytest.approx(
        get_method("autograd").loss(model, adapter, _batch()), rel=1e-12
    )


def test_the_embeddings_of_a_batch_with_noise(odd_model: Callable[..., Path]) -> None:
    model = lt.load_model(odd_model("qwen2-mqa"), compute_dtype="float64")
    batch = _batch()
    shape = (sum(LENGTHS), model.spec.hidden_size)
    plain, noisy, again = (torch.empty(shape, dtype=torch.float64) for _ in range(3))
    embed(model, batch.ids, plain)
    embed_batch(model, batch, noisy, Noise(5.0, 1))
    embed_batch(model, batch, again, Noise(5.0, 1))
    assert noisy.equal(again)
    drawn = Noise(5.0, 1).add_(torch.zeros_like(plain), LENGTHS, model.spec)
    assert relative(noisy, plain + drawn) < 1e-12


def test_mezo_sees_the_same_noise_in_all_forwards(odd_model: Callable[..., Path]) -> None:
    """Or the difference of the losses, divided by a tiny step, would be the noise's.

    The estimate is the slope times z, so its product with the gradient is the slope's square.
    """
    model = lt.load_model(odd_model("qwen2-mqa"), compute_dtype="float64")
    adapter = random_adapter(model, lt.LoraConfig(r=2))
    given: dict[str, Any] = {"seed": 3, "neftune_noise_alpha": 5.0}
    exact = lt.gradients(model, adapter, _batch(), "mesp", **given).grads
    method = get_method("mezo", MethodOptions(zo_eps=1e-6))
    ours = lt.gradients(model, adapter, _batch(), method, **given).grads
    z = Direction(adapter, 3, 0)
    slope = sum(float((exact[n] * z.of(n)).sum()) for n in exact)
    for name, estimate in ours.items():
        assert relative(estimate, slope * z.of(name)) < 1e-5
