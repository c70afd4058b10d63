"""Evaluation weighs every labelled token alike, however the sequences are batched."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lowtide as lt
from lowtide.errors import TrainingError
from lowtide.infer.evaluate import Evaluation, evaluate
from lowtide.methods import METHODS, get_method
from lowtide.model.decoder import Decoder


class Rows:
    """A data set in memory."""

    def __init__(self, rows: list[tuple[list[int], list[int]]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def longest(self) -> int:
        return max(len(ids) for ids, _ in self.rows)

    def lengths_of(self, indices: Any) -> Any:
        return np.array([len(self.rows[i][0]) for i in indices])

    def sequence(self, i: int) -> tuple[list[int], list[int]]:
        return self.rows[i]


def random_rows() -> Rows:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (17, 2, 40, 9, 1, 23, 5):
        ids = torch.randint(260, (length,), generator=generator).tolist()
        labels = [token if token % 3 else -100 for token in ids]
        rows.append((ids, labels))
    rows.append(([1, 2, 3], [-100, -100, -100]))
    return Rows(rows)


def truth(decoder: Decoder, rows: Rows) -> tuple[float, int]:
    """From the whole logits of one sequence at a time."""
    total, count = 0.0, 0
    for ids, labels in rows.rows:
        targets = torch.tensor(labels[1:], dtype=torch.int64)
        if bool((targets != -100).any()):
            logits = lt.logits(decoder, None, ids)[:-1]
            total += float(F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"))
            count += int((targets != -100).sum())
    return total / count, count


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_the_loss_is_the_mean_over_labelled_tokens(
    decoder: Decoder, method: str, batch_size: int
) -> None:
    rows = random_rows()
    expected, count = truth(decoder, rows)
    found = evaluate(decoder, None, rows, get_method(method), batch_size=batch_size)
    assert found.n_tokens == count
    assert found.loss == pytest.approx(expected, rel=1e-11)
    assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-9)


def test_max_batches_takes_the_first(decoder: Decoder) -> None:
    rows = random_rows()
    found = evaluate(decoder, None, rows, get_method("mesp"), batch_size=2, max_batches=2)
    expected, count = truth(decoder, Rows(rows.rows[:4]))
    assert (found.n_tokens, found.loss) == (count, pytest.approx(expected, rel=1e-11))


def test_dropout_is_off(decoder: Decoder) -> None:
    losses = []
    for dropout in (0.0, 0.9):
        adapter = lt.Adapter.create(decoder, lt.LoraConfig(lora_dropout=dropout), seed=1)
        for parameter in adapter.parameters.values():
            parameter.add_(0.05)
        losses.append(evaluate(decoder, adapter, random_rows(), get_method("mesp")).loss)
    assert losses[0] == losses[1]
    assert losses[0] != pytest.approx(truth(decoder, random_rows())[0], rel=1e-4)


def test_a_loss_that_is_not_finite_is_an_error(decoder: Decoder) -> None:
    adapter = lt.Adapter.create(decoder, seed=1)
    next(iter(adapter.parameters.values())).fill_(float("inf"))
    with pytest.raises(TrainingError, match="the loss on this data is nan") as error:
        evaluate(decoder, adapter, random_rows(), get_method("mesp"))
    assert "lower --learning-rate" in str(error.value)
    assert error.value.exit_code == 1


def test_a_perplexity_beyond_floats_is_infinite() -> None:
    assert Evaluation(2000.0, 3).perplexity == math.inf
