"""The view of a run in a terminal: what is in it, at any width, and what it leaves behind."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import small
from rich.console import Console

from lowtide.cli.live import LiveView
from lowtide.cli.main import main
from lowtide.cli.output import Output
from lowtide.cli.trace import Trace
from lowtide.infer.evaluate import Evaluation
from lowtide.train.history import StepReport
from lowtide.train.observers import Sample

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def report(step: int) -> StepReport:
    return StepReport(
        step=step, loss=4.0 - step / 100, n_tokens=10, wall_s=0.5, cpu_s=1, tokens_per_s=1234.5,
        peak_anon_bytes=78_300_000, peak_rss_bytes=0, peak_file_bytes=0, disk_read_bytes=0,
        learning_rate=9.75e-5, grad_norm=1.0, grad_norms=[],
    )  # fmt: skip


def view(width: int) -> LiveView:
    made = LiveView(Output(as_json=False), 2000, 90_000_000)
    made._console = Console(file=Terminal(), width=width, force_terminal=True)
    made._live = None
    for step in range(1, 201):
        made.on_step(report(step))
    made.on_valid(100, Evaluation(3.5, 50))
    made.on_valid(200, Evaluation(3.75, 50))
    made.on_save(200)
    made.on_sample(Sample(200, "Dear", "Grandmother,\n[bold]the sea[/] is calm " + "today " * 30))
    made._temperature = lambda: 71.6  # type: ignore[assignment]
    made.on_pause("the device runs from its battery")
    return made


def drawn(made: LiveView) -> list[str]:
    made._console.print(made.rendered())
    assert isinstance(made._console.file, Terminal)
    return CONTROL.sub("", made._console.file.getvalue()).splitlines()


@pytest.mark.parametrize("width", [10, 24, 40, 80, 120])
def test_each_line_stays_one_line(width: int) -> None:
    lines = drawn(view(width))
    assert len(lines) == 7
    assert max(map(len, lines)) <= width - 3  # room for the ^C that a terminal shows


def test_what_is_at_a_glance() -> None:
    step, loss, valid, speed, memory, sample, state = drawn(view(93))
    assert re.fullmatch(r"step     200/2,000 ━+─+  10%  \S+( \S+)? left", step)
    assert re.fullmatch(r"loss     2\.0950 █[▁▂▃▄▅▆▇█]+▁", loss)  # the mean of the last 20
    assert valid == "valid    3.7500 best 3.5000 at step 100"
    assert speed == "speed    1,234 tokens/s  rate 9.75e-05  72 °C"
    assert memory == "memory   78.3 MB of 90.0 MB allowed  saved at step 200"
    assert sample.startswith("at 200   Dear → Grandmother, [bold]the sea[/] is calm today")
    assert state == "paused: the device runs from its battery"


def test_a_terminal_gets_the_view_instead_of_lines(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    terminal = Terminal()
    arguments = [
        "train", "--model", model, "--data", data, "--adapter-path", tmp_path / "out",
        "--iters", 5, "--max-seq-length", 32, "--save-every", 2, "--valid-records", 3,
    ]  # fmt: skip
    with contextlib.redirect_stdout(terminal):
        assert main([str(argument) for argument in arguments]) == 0
    shown = CONTROL.sub("", terminal.getvalue())
    assert re.search(r"step     5/5 ━+ 100%  0\.0s left", shown)
    assert re.search(r"valid    \d+\.\d+ best \d+\.\d+ at step", shown)
    assert re.search(r"speed    [\d,]+ tokens/s  rate 1\.00e-04", shown)
    assert "step 1/5  loss" not in shown  # the lines that the view replaces
    lines = [line.strip() for line in re.split(r"[\r\n]", shown)]
    assert any(line.startswith("done: 5 updates") for line in lines)


def test_ctrl_c_leaves_a_clean_terminal(model: Path, data: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 50, 0, 0))
    process = subprocess.Popen(
        small.command(
            "train", "--model", model, "--data", data, "--adapter-path", tmp_path / "out",
            "--iters", 10**7, "--max-seq-length", 32, "--save-every", 10**7,
        ),
        stdout=theirs, stderr=theirs, stdin=theirs, env=small.environment(TERM="xterm"),
        start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    text, sent = b"", False
    with contextlib.suppress(OSError):  # the terminal's end
        while piece := os.read(ours, 65536):
            text += piece
            if not sent and text.count(b"tokens/s") >= 2:
                os.killpg(process.pid, signal.SIGINT)
                sent = True
    os.close(ours)
    assert process.wait(timeout=60) == 130
    shown = text.decode()
    assert "Traceback" not in shown
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") > 0  # the cursor is back
    after = CONTROL.sub("", shown[shown.rfind("\x1b[?25h") :])
    assert "interrupted after" in after
    drawn_lines = [line for line in CONTROL.sub("", shown).splitlines() if line.startswith("loss ")]
    assert max(map(len, drawn_lines)) <= 50


def test_rich_is_for_terminals_only(model: Path, data: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from lowtide.cli.main import main; code = main(sys.argv[1:]); "
        "print(code, 'rich' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "--model", str(model), "--data", str(data),
         "--adapter-path", str(tmp_path / "out"), "--iters", "2", "--max-seq-length", "32"],
        capture_output=True, text=True, check=False, env=small.environment(),
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr


def test_a_trace_keeps_the_whole_run_in_little_room() -> None:
    trace = Trace(room=8)
    assert trace.line(10) == ""
    trace.add(5.0)
    assert trace.line(10) == "▁"
    for value in (float("nan"), float("inf")):
        trace.add(value)
    for _ in range(1000):
        trace.add(5.0)
    assert set(trace.line(10)) == {"▁"}
    rising = Trace(room=8)
    for value in range(10_000):
        rising.add(float(value))
    line = rising.line(100)
    assert 4 <= len(line) <= 8
    assert list(line) == sorted(line)
    assert (line[0], line[-1]) == ("▁", "█")
    assert set(rising.line(3, plain=True)) <= set("_.-~=+*#")
    assert len(rising.line(3)) == 3
