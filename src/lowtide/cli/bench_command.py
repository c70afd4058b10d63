"""`lowtide bench NAME`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lowtide.bench.case import Summary
from lowtide.bench.compare import CompareSettings, bench_compare, compare_lines
from lowtide.bench.lengths import LengthsSettings, bench_lengths, lengths_lines
from lowtide.bench.paper import PaperSettings, bench_paper
from lowtide.bench.peers import PeersSettings, bench_peers
from lowtide.bench.quality_case import QualitySettings, bench_quality, quality_lines
from lowtide.bench.step import BenchStepSettings, bench_step
from lowtide.bench.timeline import describe, timeline_step
from lowtide.config import did_you_mean, setting
from lowtide.errors import ConfigError

from .output import Output, megabytes, settings_of


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Settings of `lowtide bench report`."""

    out: str = setting(help="results directory; the report is written into it", filled=True)


def run(argv: Sequence[str]) -> int:
    """Measure; the first word says what."""
    if argv and argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if not argv or argv[0] not in BENCHES:
        found = f"unknown bench {argv[0]!r}{did_you_mean(argv[0], BENCHES)}" if argv else "no name"
        raise ConfigError(f"bench: {found}. Benches: {', '.join(BENCHES)}.")
    bench = BENCHES[argv[0]]
    description = f"{bench.help[0].upper()}{bench.help[1:]}."
    return bench.run(_with_paths(argv[1:], bench.paths), argv[0], description)


def _usage() -> str:
    lines = [f"  {name:<10} {bench.help.split('; ')[0]}" for name, bench in BENCHES.items()]
    return (
        "usage: lowtide bench NAME [flags]\n\nMeasure memory and time. Each case of `paper` and "
        "`peers` runs in a fresh process.\n\nnames:\n"
        + "\n".join(lines)
        + "\n\nEach takes --help, --config FILE.yaml and --json."
    )


def _with_paths(argv: Sequence[str], names: Sequence[str]) -> list[str]:
    """Leading words become the flags that they stand for."""
    words = list(argv)
    for place, name in enumerate(names):
        if place < len(words) and not words[place].startswith("-"):
            words[place] = f"--{name}={words[place]}"
    return words


def _step(argv: Sequence[str], name: str, text: str) -> int:
    settings, output = settings_of(BenchStepSettings, f"bench {name}", text, argv)
    result = bench_step(settings, output.say)
    output.say(
        f"{result['method']}  T={result['seq_len']}  batch {result['batch_size']}  "
        f"{result['optimizer']}  r={result['lora_r']}  {result['threads']} threads"
    )
    for number, step in enumerate([result["warmup_step"], *result["steps"]]):
        output.say(_line("warm-up" if number == 0 else f"step {number}", step))
    output.say(
        _line("median", result) + f"  gemm_utilization {result['gemm_utilization']:.2f}  "
        f"product_utilization {result['product_utilization']:.2f}"
    )
    if result["time_split_s"] is not None:
        output.say(_split_line(result["time_split_s"]))
    output.result(result)
    return 0


def _split_line(split: Mapping[str, float]) -> str:
    whole = sum(split.values())
    parts = (f"{name} {part:.2f} s ({part / whole:.0%})" for name, part in split.items())
    return "split    " + "  ".join(parts)


def _lengths(argv: Sequence[str], name: str, text: str) -> int:
    settings, output = settings_of(LengthsSettings, f"bench {name}", text, argv)
    result = bench_lengths(settings, output.say)
    for line in lengths_lines(result):
        output.say(line)
    output.result(result)
    return 0


def _line(name: str, step: Mapping[str, float]) -> str:
    return (
        f"{name:<8} peak_anon {megabytes(step['peak_anon_bytes'])}  peak_rss "
        f"{megabytes(step['peak_rss_bytes'])}  peak_file "
        f"{megabytes(step['peak_file_bytes'])}  wall {step['wall_s']:.2f} s  cpu "
        f"{step['cpu_s']:.2f} s  {step['tokens_per_s']:,.0f} tokens/s"
    )


def _timeline(argv: Sequence[str], name: str, text: str) -> int:
    settings, output = settings_of(BenchStepSettings, f"bench {name}", text, argv)
    result = timeline_step(settings, output.say)
    output.say(describe(result))
    output.result(result)
    return 0


def _quality(argv: Sequence[str], name: str, text: str) -> int:
    settings, output = settings_of(QualitySettings, f"bench {name}", text, argv)
    result = bench_quality(settings, output.say)
    for line in quality_lines(result):
        output.say(line)
    output.result(result)
    return 0


def _paper(argv: Sequence[str], name: str, text: str) -> int:
    settings, output = settings_of(PaperSettings, f"bench {name}", text, argv)
    return _ended(bench_paper(settings, output.say), settings.out, output)


def _peers(argv: Sequence[str], name: str, text: str) -> int:
    settings, output = settings_of(PeersSettings, f"bench {name}", text, argv)
    return _ended(bench_peers(settings, output.say), settings.out, output)


def _ended(summary: Summary, out: str, output: Output) -> int:
    """Exit code 1 when a case failed."""
    output.result({"out": out, **asdict(summary)})
    return 1 if summary.failed else 0


def _compare(argv: Sequence[str], name: str, text: str) -> int:
    settings, output = settings_of(CompareSettings, f"bench {name}", text, argv)
    result = bench_compare(settings)
    for line in compare_lines(result):
        output.say(line)
    output.result(result)
    return 0


def _report(argv: Sequence[str], name: str, text: str) -> int:
    from lowtide.bench.report import report

    settings, output = settings_of(ReportSettings, f"bench {name}", text, argv)
    html, markdown = report(Path(settings.out).expanduser())
    output.say(f"{html}\n{markdown}")
    output.result({"html": str(html), "markdown": str(markdown)})
    return 0


@dataclass(frozen=True)
class _Bench:
    help: str
    run: Callable[[Sequence[str], str, str], int]
    paths: tuple[str, ...] = ()
    """Settings that may be given as words, in this order."""


BENCHES = {
    "step": _Bench(
        "training steps of one method on random token ids; the first warms up and is reported "
        "apart, figures are the median of the others",
        _step,
    ),
    "lengths": _Bench("memory and time of a step at several sequence lengths", _lengths),
    "timeline": _Bench("live bytes by kind over one training step, its peak named", _timeline),
    "quality": _Bench("how near MeZO's estimate comes to the exact gradient", _quality),
    "paper": _Bench("the paper's tables and plots; goes on where it was stopped", _paper),
    "peers": _Bench("TRL + PEFT and mlx-lm, where they are installed", _peers),
    "compare": _Bench("two runs' results side by side", _compare, ("before", "after")),
    "report": _Bench("results as one HTML page and Markdown", _report, ("out",)),
}
