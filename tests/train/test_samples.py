"""Samples during training: what generation itself gives, at no cost to the run's result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small
from runs import train

import lowtide as lt
from lowtide.errors import DataError
from lowtide.memory.heap import _KEPT_BYTES
from lowtide.methods import METHODS
from lowtide.train import samples as module
from lowtide.train.history import StepReport
from lowtide.train.observers import Quiet

PROMPTS = ["The number", ""]


def told(out: Path) -> list[tuple[int, str, str]]:
    entries = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [(e["step"], e["sample"]["prompt"], e["sample"]["text"]) for e in entries
            if "sample" in e]  # fmt: skip


def generated(model: Path, adapter: Path, prompt: str, tokens: int) -> str:
    outcome = small.run(
        "generate", "--model", model, "--adapter-path", adapter, "--prompt", prompt,
        "--max-tokens", tokens, "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    return str(outcome.document["text"])


def test_a_sample_is_what_generate_gives(model: Path, data: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"learning_rate": 0.05, "batch_size": 4}
    train(
        model, data, tmp_path / "whole", iters=5, sample_prompt=PROMPTS, steps_per_sample=2,
        sample_tokens=12, **given,
    )  # fmt: skip
    samples = told(tmp_path / "whole")
    assert [(step, prompt) for step, prompt, _ in samples] == [
        (step, prompt) for step in (0, 2, 4, 5) for prompt in PROMPTS
    ]
    for steps in (2, 4):
        train(model, data, tmp_path / str(steps), iters=steps, **given)
    (tmp_path / "5").symlink_to(tmp_path / "whole")
    for step, prompt, text in samples:
        if step:
            assert text == generated(model, tmp_path / str(step), prompt, 12)
    texts = {step: text for step, prompt, text in samples if prompt}
    assert texts[5] != texts[0]


@pytest.mark.parametrize(
    "given",
    [*({"method": name} for name in METHODS if name != "autograd"),
     {"recompute_h": False, "keep_blocks": 1}, {"grad_accumulation_steps": 2}],
)  # fmt: skip
def test_samples_leave_the_adapter_as_it_would_be(
    model: Path, data: Path, tmp_path: Path, given: dict[str, Any]
) -> None:
    base = {"iters": 4, "lora_dropout": 0.2, "seed": 3, "valid_data": data, **given}
    train(model, data, tmp_path / "without", **base)
    train(model, data, tmp_path / "with", **base, sample_prompt=PROMPTS, steps_per_sample=1)
    a, b = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("without", "with"))
    assert a == b


PEAK = """
import json, sys
import lowtide as lt
model, data, out, prompts = sys.argv[1:]
result = lt.train(
    model=model, data=data, adapter_path=out, iters=4, max_seq_length=60, batch_size=20,
    sample_prompt=json.loads(prompts), steps_per_sample=2 if json.loads(prompts) else None,
)
print(json.dumps([result.peak_anon_bytes, "tokenizers" in sys.modules]))
"""


def test_samples_cost_neither_peak_nor_a_tokenizer(data: Path, tmp_path: Path) -> None:
    """malloc may keep what it keeps; the buffers of both are never there at once."""
    sizes = {"hidden_size": 128, "intermediate_size": 300, "num_hidden_layers": 4}
    model = small.write_small_model(tmp_path / "model", **sizes)
    peaks = []
    for name, prompts in (("without", []), ("with", PROMPTS)):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(model), str(data), str(tmp_path / name),
             json.dumps(prompts)],
            capture_output=True, text=True, check=False, env=small.environment(),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        peak, tokenizers = json.loads(done.stdout)
        assert not tokenizers
        peaks.append(peak)
    assert peaks[0] > 2 * _KEPT_BYTES
    assert peaks[1] <= peaks[0] + _KEPT_BYTES


def test_the_step_gives_its_buffers_back_first(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sampler, seen = module.generate, module.Sampler.__init__, []

    def init(self: Any, trainer: Any, *given: Any) -> None:
        seen.append(trainer)
        sampler(self, trainer, *given)

    def watched(*given: Any, **more: Any) -> Any:
        buffers = seen[0].method._buffers
        assert buffers._ws is None
        assert buffers._rows is None
        seen.append("generated")
        return real(*given, **more)

    monkeypatch.setattr(module.Sampler, "__init__", init)
    monkeypatch.setattr(module, "generate", watched)
    train(model, data, tmp_path / "out", sample_prompt="One", steps_per_sample=2)
    assert seen[1:] == ["generated"] * 3


def test_prompts_from_a_file_and_from_flags(model: Path, data: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("sample_prompt: [One, 'Two, three']\nsteps-per-sample: 9\n")
    base = (
        "train", "--config", config, "--model", model, "--data", data, "--iters", 1,
        "--max-seq-length", 32,
    )  # fmt: skip
    outcome = small.run(*base, "--adapter-path", tmp_path / "a")
    assert outcome.code == 0, outcome.err
    assert [prompt for _, prompt, _ in told(tmp_path / "a")] == ["One", "Two, three"] * 2
    saved = tmp_path / "a" / "run.yaml"
    assert "sample_prompt:\n- One\n- Two, three\n" in saved.read_text()
    outcome = small.run(
        "train", "--config", saved, "--adapter-path", tmp_path / "b", "--sample-prompt", "Four",
        "--sample-prompt", "Five",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert [prompt for _, prompt, _ in told(tmp_path / "b")] == ["Four", "Five"] * 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--steps-per-sample", 5], "--steps-per-sample is for --sample-prompt, which is not"),
        (["--sample-tokens", 5], "--sample-tokens is for --sample-prompt, which is not given"),
        (["--sample-prompt", "a" * 80],
         "--sample-prompt 'aaaaaa"),
        (["--sample-prompt", "a", "--steps-per-sample", 0], "expected at least 1"),
    ],
)  # fmt: skip
def test_samples_that_cannot_be_made(
    model: Path, data: Path, tmp_path: Path, flags: list[object], said: str
) -> None:
    out = tmp_path / "out"
    outcome = small.run(
        "train", "--model", model, "--data", data, "--adapter-path", out, "--max-seq-length", 32,
        *flags,
    )  # fmt: skip
    assert outcome.code == 2
    assert said in outcome.err
    assert not out.exists()


def test_a_sample_that_fails_does_not_end_the_run(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowtide.errors import LowtideError

    def dies(*given: Any) -> Any:
        raise LowtideError("the process that runs the tokenizer was ended by signal 9.")

    monkeypatch.setattr(module.Interpreter, "decode", dies)
    outcome = small.run(
        "train", "--model", model, "--data", data, "--adapter-path", tmp_path / "out", "--iters", 2,
        "--max-seq-length", 32, "--sample-prompt", "One", "--steps-per-sample", 1,
    )  # fmt: skip
    assert outcome.code == 0
    assert "no sample at step 1: the process that runs the tokenizer was ended" in outcome.err
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_resumed_run_goes_on_with_its_samples(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = {"iters": 4, "sample_prompt": ["One"], "steps_per_sample": 2}
    train(model, data, out, observer=Stops(), **given)
    outcome = small.run("train", "--adapter-path", out, "--resume")
    assert outcome.code == 0, outcome.err
    assert "changed" not in outcome.out  # a list of texts is the same after a checkpoint
    assert [step for step, _, _ in told(out)] == [0, 2, 4]


class Stops(Quiet):
    """Stops after the third update."""

    def on_step(self, report: StepReport) -> None:
        if report.step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("prompts.txt", "\ufeffA red\r\n\n  a blue \nlast"),
        ("prompts.jsonl", '"A red"\n\n{"prompt": "  a blue ", "completion": "x"}\n"last"\n'),
    ],
)
def test_prompts_from_a_file(name: str, text: str, model: Path, data: Path, tmp_path: Path) -> None:
    path, out = tmp_path / name, tmp_path / "out"
    path.write_text(text, encoding="utf-8")
    more = {"steps_per_sample": 4, "sample_tokens": 3}
    train(model, data, out, sample_prompt="first", sample_prompts_file=path, **more)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    asked = ["first", "A red", "  a blue ", "last"]
    assert [row["sample"]["prompt"] for row in rows if "sample" in row] == asked * 2
    path.unlink()  # run.yaml has what was in it
    lt.train(adapter_path=out, resume=True, iters=5)
    path.write_text('"other"' if name.endswith("l") else "other")
    lt.train(adapter_path=out, resume=True, iters=6, sample_prompts_file=path)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    told = [(row["step"], row["sample"]["prompt"]) for row in rows if "sample" in row]
    assert told[-5:] == [*((5, prompt) for prompt in asked), (6, "other")]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("p.txt", b"\n \n", "holds no prompts. Write one on each line"),
        ("p.txt", b"\xff\xfe", "is not UTF-8 text"),
        ("p.jsonl", b'"a"\n[1]\n', "line 2: expected a text such as"),
        ("p.jsonl", b'{"text": "a"}', "line 1: expected a text such as"),
        ("p.jsonl", b'"' + b"[" * 100_000, "line 1: expected a text such as"),
        ("p.txt", None, "No such file|does not exist"),
    ],
)
def test_a_file_without_prompts_is_refused(
    name: str, content: bytes | None, told: str, model: Path, data: Path, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=told) as error:
        train(model, data, tmp_path / "out", sample_prompts_file=path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 1000
    assert not (tmp_path / "out").exists()
