"""`lowtide check`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowtide.check.compare import Comparison
from lowtide.check.run import (
    DRAWS,
    FLOAT32_EPS,
    FLOAT32_FACTOR,
    FLOAT64_BOUND,
    CheckResult,
    check_gradients,
    expected_cosine,
    filled_adapter,
)
from lowtide.config import setting
from lowtide.data.cache import TokenDataset
from lowtide.data.prepare import prepare
from lowtide.infer.evaluate import batch_of
from lowtide.memory.available import available_bytes
from lowtide.model.adapter import Adapter
from lowtide.model.batch import Batch
from lowtide.model.decoder import Decoder
from lowtide.train.lora_settings import LoraSettings
from lowtide.train.recipe import MAX_BATCH
from lowtide.train.run import check_length, data_request, open_model
from lowtide.train.settings import MAX_SEED, DataSettings, ModelSettings

from .output import Output, count, megabytes, settings_of

_DESCRIPTION = (
    "Hold the gradients of every exact method against plain autograd on your own model and data, "
    "in the same precision and, where it fits in memory, in float64. Exit code 1 when a parameter "
    "is off by more than its bound. The adapter is a fresh one whose B is filled with small random "
    "values (with B zero no gradient would reach A), or the one of --adapter-path."
)
_BOUNDS = {
    "float64": f"relative error <= {FLOAT64_BOUND:.0e}",
    "float32": f"relative error <= {FLOAT32_FACTOR} x the largest of {DRAWS} draws of autograd's "
    f"own float32 error + {FLOAT32_EPS} float32 epsilon + 1 epsilon of the whole gradient's norm",
}
_SHOWN_FAILURES = 10


@dataclass(frozen=True, kw_only=True)
class CheckSettings(LoraSettings, DataSettings, ModelSettings):
    """Settings of `lowtide check`."""

    data: str = setting(
        help="file, or directory whose train split gives the batch that is checked", filled=True
    )
    adapter_path: str | None = setting(
        None,
        help="PEFT adapter directory to check with; settings of a fresh adapter are not used",
        filled=True,
    )
    records: int = setting(
        2, help="records of the data that form the batch", minimum=1, maximum=MAX_BATCH
    )
    max_seq_length: int = setting(
        128, help="tokens per sequence; longer ones are cut, and reported", minimum=2
    )
    seed: int = setting(
        0, help="seed of the adapter, dropout and mezo's direction", minimum=0, maximum=MAX_SEED
    )


def run(argv: Sequence[str]) -> int:
    """Check; exit code 1 when a bound is exceeded."""
    settings, output = settings_of(CheckSettings, "check", _DESCRIPTION, argv)
    model = open_model(settings)
    check_length(model, settings.max_seq_length)
    if settings.adapter_path is not None:
        adapter = Adapter.load(Path(settings.adapter_path).expanduser(), model)
    else:
        adapter = filled_adapter(model, settings.lora_config(model.spec), settings.seed)
    batch = _batch(settings, model)
    output.say(
        f"batch  {len(batch.lengths)} records, {sum(batch.lengths):,} tokens, "
        f"{batch.n_tokens:,} labelled; adapter of {count(adapter.n_parameters)} parameters"
    )
    available = available_bytes()
    result = check_gradients(
        model, adapter, batch, available=available, seed=settings.seed,
        said=lambda text: output.say(f"...    {text}"),
    )  # fmt: skip
    _say(result, adapter.n_parameters, available, output)
    output.result(_document(result, adapter.n_parameters, batch, available))
    return 0 if result.passed else 1


def _batch(settings: CheckSettings, model: Decoder) -> Batch:
    report = prepare(data_request(settings, model, settings.data))
    dataset = TokenDataset.open(report.splits["train"].path)
    return batch_of(dataset, range(min(settings.records, len(dataset))))


def _say(result: CheckResult, n_parameters: int, available: int, output: Output) -> None:
    truth = result.truth
    output.say(
        f"truth  {truth.name}: the best that fits in memory, needs about "
        f"{megabytes(truth.needed_bytes)} of {megabytes(available)}\n"
    )
    output.say(
        f"{'method':<8} {'in':<8} {'against':<20} {'worst error':>11} {'bound':>8} "
        f"{'1 - cosine':>10}  worst parameter"
    )
    for method, comparisons in result.exact.items():
        for one in comparisons:
            output.say(f"{method:<8} {one.precision:<8} {_line(one)}")
    _say_modules(result, output)
    for method, cosine in result.inexact.items():
        expected = ""
        if method == "mezo":
            expected = f"; of the size {expected_cosine(1, n_parameters):.2e} by theory"
        output.say(f"{method} is not exact: cosine with the truth {cosine:.2e}{expected}")
    failures = _failures(result)
    for method, one, name, error, bound in failures[:_SHOWN_FAILURES]:
        output.say(
            f"FAILED {method} in {one.precision} against {one.against}: {name} is off by "
            f"{error:.2e}, bound {bound:.2e}"
        )
    if len(failures) > _SHOWN_FAILURES:
        output.say(f"... and {len(failures) - _SHOWN_FAILURES:,} more")
    if result.passed:
        output.say("passed: every gradient is within its bound")


def _line(one: Comparison) -> str:
    whole = one.whole
    return (
        f"{one.against:<20} {whole.worst_relative_error:>11.1e} {one.bound:>8.1e} "
        f"{1 - whole.cosine:>10.1e}  {_short(whole.worst_parameter)}"
    )


def _say_modules(result: CheckResult, output: Output) -> None:
    """Worst errors and cosines by module, a column for each method and precision."""
    columns = [
        (method, one)
        for method, comparisons in result.exact.items()
        for one in comparisons
        if one.against == result.truth.name
    ]
    if not columns:
        return
    heads = [f"{method} {one.precision}" for method, one in columns]
    output.say("\nby module: worst error, and 1 - cosine")
    output.say(f"{'':<10}" + "".join(f"{head:>20}" for head in heads))
    for module in columns[0][1].modules:
        parts = [one.modules[module] for _, one in columns]
        cells = [f"{p.worst_relative_error:.1e}  {1 - p.cosine:.1e}" for p in parts]
        output.say(f"{module:<10}" + "".join(f"{cell:>20}" for cell in cells))
    output.say()


def _short(name: str) -> str:
    return name.removeprefix("base_model.model.model.").removesuffix(".weight")


def _failures(result: CheckResult) -> list[tuple[str, Comparison, str, float, float]]:
    """Method, comparison, parameter, error and bound of what exceeded, the worst first."""
    found = [
        (method, one, name, error, bound)
        for method, comparisons in result.exact.items()
        for one in comparisons
        for name, (error, bound) in one.exceeded.items()
    ]
    return sorted(found, key=lambda failure: -failure[3] / failure[4])


def _document(
    result: CheckResult, n_parameters: int, batch: Batch, available: int
) -> dict[str, Any]:
    compared = result.against_truth
    worst = max((one.whole for one in compared), key=lambda part: part.worst_relative_error)
    methods: dict[str, Any] = {
        method: {"exact": True, "comparisons": [_comparison(one) for one in comparisons]}
        for method, comparisons in result.exact.items()
    }
    for method, cosine in result.inexact.items():
        methods[method] = {"exact": False, "cosine": cosine}
    if "mezo" in methods:
        methods["mezo"]["expected_cosine"] = expected_cosine(1, n_parameters)
    return {
        "passed": result.passed,
        "worst_relative_error": worst.worst_relative_error,
        "worst_parameter": worst.worst_parameter,
        "cosine": min(one.whole.cosine for one in compared),
        "truth": result.truth.name,
        "truth_needed_bytes": result.truth.needed_bytes,
        "available_bytes": available,
        "loss": result.loss,
        "n_tokens": batch.n_tokens,
        "n_parameters": n_parameters,
        "bounds": _BOUNDS,
        "failures": [
            {"method": method, "precision": one.precision, "against": one.against,
             "parameter": name, "relative_error": error, "bound": bound}
            for method, one, name, error, bound in _failures(result)
        ],
        "methods": methods,
    }  # fmt: skip


def _comparison(one: Comparison) -> dict[str, Any]:
    return {
        "precision": one.precision,
        "against": one.against,
        "passed": one.passed,
        "bound": one.bound,
        **asdict(one.whole),
        "modules": {module: asdict(part) for module, part in one.modules.items()},
    }
