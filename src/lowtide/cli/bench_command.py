"""`lowtide bench step`."""

from __future__ import annotations

from collections.abc import Sequence

from lowtide.bench.step import BenchStepSettings, bench_step
from lowtide.config import did_you_mean
from lowtide.errors import ConfigError

from .output import megabytes, settings_of

_BENCHES = ("step",)


def run(argv: Sequence[str]) -> int:
    """Measure; the first word says what."""
    if not argv or argv[0] not in _BENCHES:
        if argv and argv[0] in ("-h", "--help"):
            print("usage: lowtide bench step [flags]; see `lowtide bench step --help`")
            return 0
        found = f"unknown bench {argv[0]!r}{did_you_mean(argv[0], _BENCHES)}" if argv else "no name"
        raise ConfigError(f"bench: {found}. Benches: {', '.join(_BENCHES)}.")
    settings, output = settings_of(
        BenchStepSettings,
        "bench step",
        "Measure training steps of one method on random token ids. The first step warms up and is "
        "reported apart; figures are the median of the others.",
        argv[1:],
    )
    result = bench_step(settings, output.say)
    output.say(
        f"{result['method']}  T={result['seq_len']}  batch {result['batch_size']}  "
        f"{result['optimizer']}  r={result['lora_r']}  {result['threads']} threads"
    )
    for number, step in enumerate([result["warmup_step"], *result["steps"]]):
        output.say(_line("warm-up" if number == 0 else f"step {number}", step))
    output.say(_line("median", result) + f"  gemm_utilization {result['gemm_utilization']:.2f}")
    output.result(result)
    return 0


def _line(name: str, step: dict[str, float]) -> str:
    return (
        f"{name:<8} peak_anon {megabytes(step['peak_anon_bytes'])}  peak_rss "
        f"{megabytes(step['peak_rss_bytes'])}  wall {step['wall_s']:.2f} s  cpu "
        f"{step['cpu_s']:.2f} s  {step['tokens_per_s']:,.0f} tokens/s"
    )
