"""The page about a run: everything is on it, nothing is loaded, nothing that it shows can run."""

from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import small
from made_runs import END, NASTY, START, PageRead, update, write_run

SECTIONS = [
    "Summary", "Loss", "Learning rate and gradients", "Memory", "Speed and temperature", "Samples",
    "What happened", "Settings", "Model, data, machine", "Numbers",
]  # fmt: skip


def page(run: Path, *more: object) -> PageRead:
    outcome = small.run("report", run, *more)
    assert outcome.code == 0, outcome.err
    return PageRead((run / "report.html").read_text(encoding="utf-8"))


def whole(tmp_path: Path) -> Path:
    metrics: list[Any] = [{"step": 0, "valid_loss": 3.5, "n_tokens": 5}]
    for step in range(1, 10):
        metrics.append(update(step))
        metrics.append({"step": step, "sample": {"prompt": NASTY, "text": f"told {step} {NASTY}"}})
    metrics.append({"step": 9, "valid_loss": 2.25, "n_tokens": 5})
    events = [
        START,
        {"event": "warning", "step": 3, "time": "", "message": f"odd {NASTY}"},
        {"event": "paused", "step": 4, "time": "", "reason": "the battery is in use"},
        {"event": "went on", "step": 4, "time": "", "paused_s": 61.0},
        {**START, "step": 5},
        {**END, "elapsed_s": 5.0, "cpu_s": 9.0, "energy_j": 7200.0},
    ]
    settings = f"model: /m/tiny\nmethod: mesp\niters: 9\ndata: {json.dumps(NASTY)}\n"
    return write_run(tmp_path / "letters & <notes>", metrics, events, settings)


def test_everything_is_on_the_page(tmp_path: Path) -> None:
    read = page(whole(tmp_path))
    assert read.headings == SECTIONS
    for text in (
        "letters & <notes>", "finished", "tiny with mesp", "updates of 9", "2.25", "2.0 Wh",
        "told 1", "told 9", "odd ", "paused: the battery is in use", "went on after 1m 01s",
        "taken up again", "a processor ", "letters.jsonl", "30.0 MB", "60 °C",
    ):  # fmt: skip
        assert text in read.text, text
    assert len(read.paths("c2 dots")) == 1  # validations
    assert len(read.paths("c3")) == 2  # the learning rate; mapped files
    assert len(read.paths("limit")) == 1  # the budget
    assert read.paths("mark")[0].count("M") == 2  # one resume, one pause
    assert read.tags.count("img") == 1  # the heat map


def test_nothing_is_loaded_and_nothing_can_run(tmp_path: Path) -> None:
    read = page(whole(tmp_path))
    assert read.text.count(NASTY) == 13  # 9 samples, their prompt, a warning, a setting, the CPU
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & set(read.tags)
    for tag, name, value in read.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "srcset", "data"):
            assert value.startswith("data:image/png;base64,")
        if name == "href":
            assert value.startswith("#")
        if name == "style":
            assert re.fullmatch(r"(top|left):[\d.]+%|height:\d+px", value), value
    assert "url(" not in read.style
    assert "@import" not in read.style
    policy = {v for t, n, v in read.attributes if (t, n) == ("meta", "content")}
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in policy


def test_it_fits_a_phone_and_a_dark_room(tmp_path: Path) -> None:
    read = page(whole(tmp_path))
    assert ("meta", "content", "width=device-width, initial-scale=1") in read.attributes
    assert "prefers-color-scheme: dark" in read.style
    assert "@media screen and (max-width: 760px)" in read.style


def heat_map(read: PageRead) -> list[bytes]:
    """Rows of the palette indices of the page's image."""
    source = next(v for t, n, v in read.attributes if (t, n) == ("img", "src"))
    data, at, packed = base64.b64decode(source.split(",")[1]), 8, b""
    while at < len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + length]
        (crc,) = struct.unpack(">I", data[at + 8 + length : at + 12 + length])
        assert crc == zlib.crc32(kind + body)
        if kind == b"IHDR":
            width, height = struct.unpack(">II", body[:8])
        packed += body if kind == b"IDAT" else b""
        at += 12 + length
    rows = zlib.decompress(packed)
    assert len(rows) == height * (width + 1)
    return [rows[n * (width + 1) + 1 : (n + 1) * (width + 1)] for n in range(height)]


def test_the_heat_map_shows_each_layer_on_a_logarithmic_scale(tmp_path: Path) -> None:
    norms = [[0.01, 0.01, 0.0], [0.1, 0.1, 0.1], [1.0, 1.0, None]]
    metrics = [update(s + 1, grad_norms=[layer[s] for layer in norms]) for s in range(3)]
    rows = [list(row) for row in heat_map(page(write_run(tmp_path / "run", metrics)))]
    low, middle, high = rows[0][0], rows[1][0], rows[2][0]
    assert low == 1
    assert abs((low + high) / 2 - middle) <= 1
    assert rows == [[low, low, 0], [middle] * 3, [high, high, 0]]


@pytest.mark.parametrize(
    ("metrics", "events"),
    [
        ([], []),
        ([], [START]),
        ([{"step": 0, "valid_loss": 3.0, "n_tokens": 1}], [START]),
        ([{"step": 1, "loss": 2.0}], []),
        ([{"step": 1, "loss": None, "grad_norm": None}], [START, {"event": "what"}]),
        ([update(1, layers=0)], [START]),
        ([update(1, loss=0.0, tokens_per_s=0.0, grad_norms=[0.0])] * 3, [START]),
    ],
)
def test_a_run_that_has_hardly_begun(tmp_path: Path, metrics: Any, events: Any) -> None:
    run = write_run(tmp_path / "run", metrics, events)
    assert page(run).headings == SECTIONS


def test_damage_is_counted_and_told(tmp_path: Path) -> None:
    metrics = [
        update(1), '{"step": 2, "loss"', "[]", '{"step": "x", "loss": 1}', update(2, loss="low"),
        '{"step": 1e400, "loss": 1}', update(3, grad_norms="all"), {"step": 3, "sample": 5},
        {"step": 3, "valid_loss": "good"}, update(4, grad_norms=[1e400, True, "x", 2.0]),
    ]  # fmt: skip
    run = write_run(tmp_path / "run", metrics, [START, "\x00\x00"], "model: [unclosed")
    outcome = small.run("report", run, "--json")
    assert outcome.document["damaged_lines"] == 7
    assert outcome.document["steps"] == 4
    assert "7 damaged line(s) were left out" in outcome.err
    read = page(run)
    assert "run.yaml cannot be read; 7 damaged lines were left out" in read.text
    assert read.headings == SECTIONS


def test_what_was_made_again_replaces_what_it_was(tmp_path: Path) -> None:
    metrics = [
        update(1), update(2), update(3, loss=900.0), {"step": 3, "valid_loss": 800.0},
        {"step": 3, "sample": {"prompt": "p", "text": "gone"}}, update(4, loss=900.0),
        update(3, loss=2.0), {"step": 3, "sample": {"prompt": "p", "text": "stays"}},
    ]  # fmt: skip
    read = page(write_run(tmp_path / "run", metrics, [START, {**START, "step": 2}]))
    assert "900" not in read.text
    assert "800" not in read.text
    assert "gone" not in read.text
    assert "stays" in read.text
    assert "interrupted" in read.text  # its process is not there


def test_a_long_run_makes_a_small_page(tmp_path: Path) -> None:
    metrics = (update(step, layers=12) for step in range(1, 20_001))
    run = write_run(tmp_path / "run", metrics)
    read = page(run)
    assert (run / "report.html").stat().st_size < 200_000
    assert "20,000" in read.text
    assert max(len(path) for path in read.paths("c1")) < 10_000


def test_single_peaks_are_not_smoothed_away(tmp_path: Path) -> None:
    metrics = (
        update(step, peak_anon_bytes=10**9 if step == 1234 else 10**7) for step in range(1, 3001)
    )
    read = page(write_run(tmp_path / "run", metrics))
    heights = [
        float(place.split()[1])
        for path in read.paths("c1") for place in re.findall(r"[\d.]+ [\d.]+", path)
    ]  # fmt: skip
    assert "At most 1,000.0 MB" in {v for t, n, v in read.attributes if n == "aria-label"}
    assert min(heights) < 20  # near the top


def test_a_directory_without_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    write_run(tmp_path / "all" / "one", [update(1)])
    for name, said in (
        ("absent", "there is no directory"),
        ("file", "is a file; expected a directory that `lowtide train` wrote"),
        ("all", "holds no run, but directories of it do: one. Name one of them."),
        ("", "holds no run; expected a directory that `lowtide train` wrote, with metrics.jsonl"),
    ):
        outcome = small.run("report", tmp_path / name)
        assert outcome.code == 2
        assert said in outcome.err, name
    outcome = small.run("report")
    assert outcome.code == 2
    assert "--run is required" in outcome.err
    outcome = small.run("report", tmp_path / "all" / "one", "--out", tmp_path / "no" / "page.html")
    assert outcome.code == 2
    assert "page.html cannot be written: No such file or directory" in outcome.err


def test_a_real_run(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = small.run(
        "train", "--model", model, "--data", data, "--adapter-path", out, "--iters", 6,
        "--max-seq-length", 32, "--valid-records", 4, "--steps-per-eval", 3,
    )  # fmt: skip
    assert done.code == 0, done.err
    read = page(out)
    assert read.headings == SECTIONS
    assert "finished" in read.text
    losses = [json.loads(line).get("valid_loss") for line in open(out / "metrics.jsonl")]
    assert f"{min(v for v in losses if v is not None):.4g}" in read.text
