"""What a step allocates is entered once, under its kind, and crossed out when it is freed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import environment, write_small_model

from lowtide.bench.step import BenchStepSettings
from lowtide.bench.timeline import describe, timeline_step
from lowtide.config import build
from lowtide.memory.timeline import KINDS, MAX_SAMPLES, Ledger
from lowtide.methods import METHODS, mebp
from lowtide.model import reference
from lowtide.ops import cross_entropy, fused_attention, glu_sides
from lowtide.train.optim import Sgd

TOKENS, HIDDEN, INNER, LAYERS, VOCAB, RANK = 48, 32, 40, 2, 264, 4
KV = 16
# A (r, in) and B (out, r) of q, k, v, o, gate, up, down.
PARAMETERS = LAYERS * RANK * (
    (HIDDEN + HIDDEN) * 2 + (HIDDEN + KV) * 2 + (HIDDEN + INNER) * 3
)  # fmt: skip


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("model"))


def _record(model: Path, method: str = "mesp", **given: Any) -> dict[str, Any]:
    settings = {"model": str(model), "method": method, "seq_len": TOKENS, "lora_r": RANK}
    return timeline_step(build(BenchStepSettings, {**settings, "threads": 1, **given}))


def _most(result: dict[str, Any], kind: str) -> int:
    return max(sample["bytes"][kind] for sample in result["samples"])


@pytest.mark.parametrize("method", METHODS)
def test_a_step_frees_what_it_allocates(small_model: Path, method: str) -> None:
    result = _record(small_model, method)
    assert result["leaked"] == {}
    assert result["kinds"] == list(KINDS)
    assert 50 < len(result["samples"]) <= MAX_SAMPLES
    for sample in result["samples"]:
        assert list(sample["bytes"]) == list(KINDS)
        assert min(sample["bytes"].values()) >= 0
    times = [sample["t_s"] for sample in result["samples"]]
    assert times == sorted(times)
    peak = result["peak"]
    assert sum(peak["bytes"].values()) == peak["sum_bytes"]
    assert {k: peak[k] for k in ("t_s", "rss_anon_bytes", "bytes")} in result["samples"]
    first, last = (dict(result["samples"][place]["bytes"]) for place in (0, -1))
    del first["allocator"], last["allocator"]
    assert first == last
    json.dumps(result)


def test_kinds_of_mesp_to_the_byte(small_model: Path) -> None:
    result = _record(small_model)
    for sample in result["samples"]:
        assert sample["bytes"]["adapter"] == 4 * PARAMETERS
        # A row for each block's input, and two that are used in turn.
        assert sample["bytes"]["block inputs"] == (LAYERS + 1) * TOKENS * HIDDEN * 4
        assert sample["bytes"]["model"] == 0  # stored as float32: nothing to widen
        assert sample["bytes"]["optimizer"] == 0
        # No gradient outlives its use: those of the MLP are the most at once.
        assert sample["bytes"]["gradients"] <= 4 * RANK * 3 * (HIDDEN + INNER)
    assert 0 < _most(result, "gradients")
    assert 0 < _most(result, "block intermediates") < _most(result, "buffers")
    assert 0 < _most(result, "loss") < TOKENS * VOCAB * 4


def test_kinds_of_autograd(small_model: Path) -> None:
    mesp, autograd = _record(small_model), _record(small_model, "autograd")
    assert _most(autograd, "adapter") == 4 * PARAMETERS
    # And what the sink sums up to see that they are finite.
    assert 0 <= _most(autograd, "gradients") - 4 * PARAMETERS <= 64
    assert _most(autograd, "block inputs") == _most(autograd, "buffers") == 0
    assert _most(autograd, "loss") >= 2 * (TOKENS - 1) * VOCAB * 4
    assert _most(autograd, "block intermediates") > 5 * _most(mesp, "block intermediates")
    assert autograd["samples"][-1]["bytes"]["block intermediates"] == 0


def test_full_logits_of_mebp_are_the_loss(small_model: Path) -> None:
    sweep = _record(small_model, "mebp")
    full = _record(small_model, "mebp", mebp_loss="full")
    assert _most(full, "loss") >= 2 * TOKENS * VOCAB * 4 > _most(sweep, "loss")
    assert _most(full, "block inputs") == _most(sweep, "block inputs") > 0
    assert _most(sweep, "block intermediates") >= TOKENS * INNER * 4


def test_state_of_the_optimizer(small_model: Path) -> None:
    result = _record(small_model, optimizer="adamw")
    assert result["samples"][0]["bytes"]["optimizer"] == 8 * PARAMETERS
    assert _most(result, "adapter") == 4 * PARAMETERS


def test_widened_norms_are_the_model(small_model: Path) -> None:
    result = _record(small_model, compute_dtype="float64")
    assert _most(result, "model") == (2 * LAYERS + 1) * HIDDEN * 8
    assert _most(result, "adapter") == 8 * PARAMETERS


def test_block_inputs_in_a_file_are_not_counted(small_model: Path) -> None:
    assert _most(_record(small_model, block_inputs="file"), "block inputs") == 0


def test_a_leak_appears(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, update = [], Sgd.update

    def leaky(self: Sgd, name: str, parameter: torch.Tensor, grad: torch.Tensor) -> None:
        kept.append(grad if "layers.0.self_attn.q_proj.lora_A" in name else None)
        update(self, name, parameter, grad)

    monkeypatch.setattr(Sgd, "update", leaky)
    assert _record(small_model)["leaked"] == {"gradients": 4 * RANK * HIDDEN}


def test_the_peak_is_named(small_model: Path) -> None:
    known = r"(forward|backward)( of block [01])?: \w+|loss(: \w+)?|optimizer|\w+"
    for method in METHODS:
        result = _record(small_model, method)
        assert re.fullmatch(known, result["peak"]["where"])
        text = describe(result)
        assert result["peak"]["where"] in text.splitlines()[0]
        assert f"{result['peak']['sum_bytes'] / 1e6:,.1f} MB" in text
        assert "RssAnon" in text


@pytest.mark.parametrize(
    ("method", "target", "name"),
    [
        ("mesp", (glu_sides.InputGradients, "finish"), r"backward of block [01]: glu_backward"),
        ("mesp", (fused_attention, "_scaled"), r"(forward|backward) of block [01]: attention_\w+"),
        ("mesp", (cross_entropy, "_tile_rows"), r"loss: cross_entropy"),
        ("mebp", (reference, "_rotate"), r"forward of block [01]: attention"),
        ("mebp", (mebp, "matmul_t_"), r"backward of block [01]: _FrozenProductBackward"),
        ("autograd", (reference, "_rotate"), r"forward of block [01]: attention"),
    ],
)
def test_a_spike_is_where_it_was_put(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, method: str, target: Any, name: str
) -> None:
    """20 MB, far above all else, come and go each time that a function is called."""
    owner, attribute = target
    before = getattr(owner, attribute)

    def spiking(*args: Any, **kwargs: Any) -> Any:
        torch.ones(5_000_000)
        return before(*args, **kwargs)

    monkeypatch.setattr(owner, attribute, spiking)
    peak = _record(small_model, method)["peak"]
    assert peak["sum_bytes"] > 20_000_000
    assert re.fullmatch(name, peak["where"]), peak["where"]


def test_views_and_mapped_files_are_not_counted(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    with Ledger() as ledger:
        base = torch.zeros(1000)
        parts = base.split(500)
        mapped = torch.from_file(str(path), size=1024)
        part = mapped[:10]
        with ledger.recording():
            del parts, part
    result = ledger.result()
    assert result["samples"][0]["bytes"]["other"] == 4000
    assert result["leaked"] == {}


def test_reserved_pages_that_nothing_touches_are_told() -> None:
    """1 GB, more than malloc can have kept. Pages may be of 2 MiB, touched in part at each end."""
    with Ledger() as ledger, ledger.recording():
        reserved = torch.empty(250_000_000)
        reserved[: 1 << 21] = 1.0  # 8 MiB
    untouched = ledger.result()["untouched_bytes"]
    assert 0 <= reserved.nbytes - (8 << 20) - untouched <= 2 * (2 << 20)


def test_what_only_a_graph_holds_is_live_until_the_graph_lets_go() -> None:
    with Ledger() as ledger:
        x = torch.ones(100, 100, requires_grad=True)
        with ledger.recording():
            y = (x @ x).exp().sum()  # the graph keeps the exponentials, nothing else does
            held = [entry for entry, _ in ledger._known.values()]
            (grad,) = torch.autograd.grad(y, x)
            del y, grad
    assert len(held) == 3
    assert [ledger._sizes[entry] for entry in held] == [40_000, 40_000, 4]
    assert ledger.result()["leaked"] == {}


def test_the_instrument_does_not_bring_in_torchs_compiler() -> None:
    code = (
        "import sys, torch, lowtide.bench.timeline as t\n"
        "with t.Ledger() as ledger: torch.ones(3)\n"
        "print('torch._dynamo' in sys.modules, ledger.own_bytes < 5_000_000)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True
    )
    assert done.stdout.split() == ["False", "True"]


@pytest.mark.parametrize("method", METHODS)
def test_the_sum_explains_the_peak(tmp_path: Path, method: str) -> None:
    """In a fresh process, on a model large enough that it is tensors which matter."""
    model = write_small_model(
        tmp_path, hidden_size=512, intermediate_size=1024, num_hidden_layers=4,
        num_attention_heads=8, max_position_embeddings=512,
    )  # fmt: skip
    weights = load_file(model / "model.safetensors")  # 16-bit, so that tiles are really widened
    save_file({name: w.bfloat16() for name, w in weights.items()}, model / "model.safetensors")
    code = (
        "import json, sys, lowtide\n"
        "from lowtide.bench.timeline import BenchStepSettings, timeline_step\n"
        "model, method = sys.argv[1:]\n"
        "settings = BenchStepSettings(model=model, method=method, seq_len=512, lora_r=32)\n"
        "result = timeline_step(settings)\n"
        "names = ('peak', 'untouched_bytes', 'metered_peak_bytes')\n"
        "print(json.dumps([result[name] for name in names]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(model), method], capture_output=True, text=True,
        env=environment(), check=True,
    )  # fmt: skip
    peak, untouched, metered = json.loads(done.stdout)
    assert peak["sum_bytes"] > 15_000_000
    anon = peak["rss_anon_bytes"]
    assert abs(peak["sum_bytes"] - untouched - anon) <= 0.1 * anon
    assert abs(anon - metered) <= 0.05 * metered


def test_mebp_is_not_charged_for_modules_that_autograd_imports(small_model: Path) -> None:
    """autograd.grad with a gradient handed in imports sympy: 42 MB of Python objects."""
    code = (
        "import sys, lowtide\n"
        "from lowtide.bench.step import BenchStepSettings, bench_step\n"
        "settings = BenchStepSettings(model=sys.argv[1], method='mebp', seq_len=16, steps=1)\n"
        "bench_step(settings, lambda name, step: None)\n"
        "print('sympy' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(small_model)], capture_output=True, text=True,
        env=environment(), check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["False"]
