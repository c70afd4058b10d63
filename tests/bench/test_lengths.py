"""`bench lengths` and the split of a step's time."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from small import write_small_model

import lowtide as lt
from lowtide.bench import split
from lowtide.cli.main import main
from lowtide.methods import get_method
from lowtide.methods.base import Step


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("model") / "m")


def test_a_row_per_length_and_the_slope(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["bench", "lengths", "--model", str(model), "--lengths", "32,8,16", "--json"]
    assert main(flags) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    rows = told["lengths"]
    assert [row["seq_len"] for row in rows] == [8, 16, 32]
    assert len(told["slopes"]) == 2
    rise = rows[-1]["peak_anon_bytes"] - rows[0]["peak_anon_bytes"]
    assert told["bytes_per_token"] == pytest.approx(rise / 24)
    for row in rows:
        assert set(row["time_split_s"]) == set(split.PARTS)
        assert all(seconds > 0 for seconds in row["time_split_s"].values())
    assert f"{told['bytes_per_token']:,.0f} bytes per token" in err


@pytest.mark.parametrize("text", ["8", "8,x", "1,8", ""])
def test_lengths_that_cannot_be_are_refused(
    model: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "lengths", "--model", str(model), f"--lengths={text}"]) == 2
    assert "two or more whole numbers" in capsys.readouterr().err


def test_methods_of_autograd_cannot_be_split(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(model), "--method", "mebp", "--seq-len", "8", "--time-split"]
    assert main(["bench", "step", *flags]) == 2
    assert "--time-split cannot tell apart" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("slowed", "part"),
    [
        ("lowtide.ops.cross_entropy", "loss"),
        ("lowtide.ops.fused_attention", "attention"),
        ("lowtide.weights.matrix", "widening"),
    ],
)
def test_time_is_put_where_it_was_spent(
    model: Path, slowed: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operations that one module calls are made slow; their part has most of the time."""
    decoder = lt.load_model(model, compute_dtype="float64")
    adapter = lt.Adapter.create(decoder)
    method = get_method("mesp")
    batch = lt.Batch.from_sequences([[1, 2, 3, 4]])
    watched = slowed.replace(".", "/") + ".py"

    class Sink:
        def add(self, name: str, grad: torch.Tensor) -> None:
            pass

    plain = split._Timed.__torch_dispatch__

    def slow(self, func, types, args=(), kwargs=None):
        frame = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.endswith(watched):
            frame = frame.f_back

        def later(*given, **named):
            if frame is not None:
                time.sleep(0.003)
            return func(*given, **named)

        return plain(self, _Named(later, str(func)), types, args, kwargs)

    monkeypatch.setattr(split._Timed, "__torch_dispatch__", slow)
    spent = split.time_split(
        lambda: method.step(decoder, adapter, batch, Sink(), Step(1.0, 0, 0, 0))
    )
    assert max(spent, key=lambda name: spent[name]) == part


class _Named:
    """A function that is printed as an operation is."""

    def __init__(self, call, name: str) -> None:
        self._call, self._name = call, name

    def __call__(self, *args, **kwargs):
        return self._call(*args, **kwargs)

    def __str__(self) -> str:
        return self._name
