"""A packed batch is its records apart: no record sees another, and each token weighs the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
from runs import train

import lowtide as lt
from lowtide.config import build
from lowtide.errors import ConfigError
from lowtide.infer.evaluate import batch_of
from lowtide.memory.plan import predict
from lowtide.model.decoder import Decoder
from lowtide.train import order as order_module
from lowtide.train.budget import options_of, workload
from lowtide.train.order import RecordOrder, batch_rule, batches_of_epochs, largest_batch
from lowtide.train.schedule import updates_of
from lowtide.train.settings import TrainSettings


class Rows:
    """Random sequences, a third of whose tokens are not trained on."""

    def __init__(self, lengths: list[int]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = [torch.randint(260, (n,), generator=generator).tolist() for n in lengths]
        self.longest = max(lengths)

    def __len__(self) -> int:
        return len(self.rows)

    def lengths_of(self, indices: Any) -> Any:
        return np.array([len(self.rows[i]) for i in indices])

    def sequence(self, i: int) -> tuple[list[int], list[int]]:
        return self.rows[i], [token if token % 3 else -100 for token in self.rows[i]]


def settings(**given: Any) -> TrainSettings:
    return build(TrainSettings, {"model": "-", "data": "-", "adapter_path": "-", **given})


@pytest.fixture
def adapter(decoder: Decoder) -> lt.Adapter:
    adapter = lt.Adapter.create(decoder, lt.LoraConfig(r=4), seed=1)
    generator = torch.Generator().manual_seed(2)
    for _, parameter in adapter.items():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapter


@pytest.mark.parametrize("method", ["mesp", "mebp"])
def test_a_packed_batch_has_the_gradient_of_its_records_apart(
    decoder: Decoder, adapter: lt.Adapter, method: str
) -> None:
    rows = Rows([3, 17, 2, 25, 9, 31, 8, 14, 5, 29])
    chosen = settings(packing=True, batch_size=2, max_seq_length=32)
    order = RecordOrder(rows, batch_rule(chosen))
    indices = order.take()
    assert len(indices) > 2, "more records than --batch-size fit into its tokens"
    packed = batch_of(rows, indices)
    assert len(packed.ids) <= 64
    ours = lt.gradients(decoder, adapter, packed, method=method)
    apart = [
        lt.gradients(decoder, adapter, batch_of(rows, [i]), method="autograd") for i in indices
    ]
    n_tokens = sum(one.n_tokens for one in apart)
    assert ours.n_tokens == n_tokens
    loss = sum(one.loss * one.n_tokens for one in apart) / n_tokens
    assert ours.loss == pytest.approx(loss, rel=1e-12)
    for name, grad in ours.grads.items():
        truth = sum(one.grads[name] * (one.n_tokens / n_tokens) for one in apart)
        assert float((grad - truth).norm() / truth.norm()) <= 1e-9, name


def test_the_largest_batch_counts_validation_too() -> None:
    train_rows, valid_rows = Rows([5, 9, 3, 7]), Rows([8, 12, 2])
    plain, packed = settings(batch_size=2), settings(batch_size=2, packing=True, max_seq_length=10)
    assert largest_batch(plain, train_rows, None) == (9, 9)
    assert largest_batch(packed, train_rows, None) == (9, 9, 2)
    assert largest_batch(plain, train_rows, valid_rows) == (12, 12)
    assert largest_batch(settings(batch_size=9), train_rows, Rows([4])) == (9,) * 4


def test_the_plan_of_the_largest_batch_is_enough_for_all(decoder: Decoder) -> None:
    """Buffers depend on the tokens, scores on the longest sequence and how many there are."""
    rows = Rows([2 + i * i % 47 for i in range(300)])
    for given in ({"packing": True}, {}, {"group_by_length": True}):
        chosen = settings(batch_size=2, max_seq_length=48, **given)

        def needed(lengths: Sequence[int], chosen: TrainSettings = chosen) -> int:
            work = workload(chosen, decoder, lengths, chosen.accumulates)
            return predict(work, options_of(chosen)).needed_bytes

        enough = needed(largest_batch(chosen, rows, None))
        order = RecordOrder(rows, batch_rule(chosen))
        assert all(needed(rows.lengths_of(order.take()).tolist()) <= enough for _ in range(100))


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("epochs", [1, 3, 7, 2.5])
def test_epochs_of_packed_batches_are_whole_passes(
    epochs: float, accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes have different numbers of batches; the updates take the last one and no more."""
    monkeypatch.setattr(order_module, "_PACKING_WINDOW", 16)
    rows = Rows([2 + i * i % 47 for i in range(70)])
    chosen = settings(
        packing=True, batch_size=2, max_seq_length=48, epochs=epochs,
        grad_accumulation_steps=accumulation,
    )  # fmt: skip
    order = RecordOrder(rows, batch_rule(chosen))
    each = [order.batches_in(epoch) for epoch in range(8)]
    assert len(set(each)) > 1
    updates = updates_of(chosen, batches_of_epochs(chosen, rows))
    taken = [0] * 9
    for _ in range(updates * accumulation):
        order.take()
        taken[order.position()["epoch"]] += 1
    whole = int(epochs)
    assert taken[:whole] == each[:whole]
    share = math.ceil((epochs - whole) * each[whole])
    assert share <= taken[whole] < share + accumulation
    assert sum(taken[whole + 1 :]) == 0


def test_data_check_counts_the_batches_that_training_makes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = small.write_jsonl(
        tmp_path / "d.jsonl", [{"text": "x" * (1 + i * i % 29)} for i in range(60)]
    )
    flags = ("--model", model, "--data", data, "--max-seq-length", 32, "--batch-size", 2)
    counts = {}
    for packing in (False, True):
        own = ("--packing",) if packing else ()
        monkeypatch.setattr(order_module, "_PACKING_WINDOW", 16)
        checked = small.run("data", "check", *flags, *own, "--json").document["time"]
        result = small.run(
            "train",
            *flags,
            *own,
            "--adapter-path",
            tmp_path / f"{packing}",
            "--epochs",
            1,
            "--json",
        )
        assert result.document["steps"] == checked["batches"]
        counts[packing] = checked["batches"]
        if packing:
            assert 33 < checked["measured_tokens"] <= 64
    assert counts[True] < counts[False] == 30


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"packing": True, "group_by_length": True}, "--group-by-length sorts them. Give one"),
        ({"group_by_length": True}, "with --batch-size 1 none do"),
    ],
)
def test_settings_that_would_be_ignored(
    given: dict[str, Any], message: str, model: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(model, data, tmp_path / "out", **given)
