"""`lowtide merge`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from lowtide.config import setting
from lowtide.errors import ConfigError, LowtideError, listed
from lowtide.export.compare import Difference, compare
from lowtide.export.merge import GGUF_SUFFIX, MERGE_DTYPES, MergeReport, merge
from lowtide.weights.storages import STORAGES

from .output import Output, megabytes, settings_of

_DESCRIPTION = (
    "Fold an adapter into its model: a Hugging Face directory that needs no adapter, written some "
    "rows at a time in the model's own dtype. It appears whole or not at all. With --check, a "
    "merged model is compared with MODEL + ADAPTER, and nothing is written. An --out that ends in "
    ".gguf becomes one file for llama.cpp."
)
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """Settings of `lowtide merge`."""

    model: str = setting(help="model directory, GGUF file, or a Hugging Face hub id", filled=True)
    adapter_path: str = setting(help="PEFT adapter directory to fold in", filled=True)
    out: str = setting(
        help="directory to write the merged model to, or a file *.gguf for llama.cpp", filled=True
    )
    dtype: str | None = setting(
        None,
        help="dtype of the merged weights; none keeps each tensor's, and of a quantised model "
        "takes that of its norms, or in a GGUF file f16; q8_0 is for GGUF files",
        choices=MERGE_DTYPES,
    )
    quantize: str | None = setting(
        None,
        help="merge into the weights as `train --quantize` sees them, dequantised",
        choices=tuple(STORAGES),
    )
    overwrite: bool = setting(False, help="replace the merged model that --out already holds")
    check: bool = setting(
        False, help="only compare the merged model --out with the model and the adapter"
    )


def run(argv: Sequence[str]) -> int:
    """Merge, or compare."""
    settings, output = settings_of(MergeSettings, "merge", _DESCRIPTION, argv)
    if settings.check:
        return _check(settings, output)
    report = merge(
        settings.model, settings.adapter_path, settings.out,
        dtype=settings.dtype, quantize=settings.quantize, overwrite=settings.overwrite,
        said=output.say,
    )  # fmt: skip
    _say(report, output)
    output.result({**asdict(report), "out": str(report.out)})
    return 0


def _say(report: MergeReport, output: Output) -> None:
    known = {n: error for n, error in report.update_errors.items() if error is not None}
    output.say(f"{report.out}: {megabytes(report.written_bytes)}, {' and '.join(report.dtypes)}")
    if known:
        worst = max(known, key=lambda name: known[name])
        output.say(
            f"rounding to {' and '.join(report.dtypes)} changed what the adapter changes by "
            f"{known[worst]:.2g} of it at most ({worst})"
        )
    if report.base_errors:
        worst = max(report.base_errors, key=lambda name: report.base_errors[name])
        output.say(
            f"the base is quantised: what that cost, up to {report.base_errors[worst]:.2%} of a "
            f"matrix ({worst}), stays in the merged model"
        )
    if report.out.suffix == GGUF_SUFFIX:
        output.say(f"next  llama-cli -m {report.out}")
    else:
        output.say(f'next  lowtide generate --model {report.out} --prompt "..."')


def _check(settings: MergeSettings, output: Output) -> int:
    """Print the differences; exit code 1 where they are more than rounding."""
    ignored = [flag for flag in ("dtype", "overwrite") if getattr(settings, flag)]
    if ignored:
        raise ConfigError(f"--check writes nothing, so leave out --{' and --'.join(ignored)}.")
    found = compare(settings.out, settings.model, settings.adapter_path, settings.quantize)
    adapted = [one for one in found if one.adapted]
    for one in sorted(adapted, key=_by_units)[:_SHOWN]:
        error = "" if one.update_error is None else f", {one.update_error:.2g} of the update"
        output.say(f"  {one.worst_units:8.3f} units{error}  {one.name}")
    output.say(
        f"{len(adapted)} tensors have the adapter on them, {len(found) - len(adapted)} do not "
        "(1 unit is the distance between neighbouring numbers of the dtype; a sum rounded once is "
        "within 0.5)"
    )
    problems = [problem for one in found if (problem := one.problem) is not None]
    output.result(
        {
            "out": settings.out,
            "equal": not problems,
            "worst_units": max(one.worst_units for one in found),
            "problems": problems,
            "tensors": [asdict(one) for one in found],
        }
    )
    if problems:
        output.say(
            f"{settings.out} is not {settings.model} with {settings.adapter_path} merged into it:\n"
            f"{listed(problems)}"
        )
        return LowtideError.exit_code
    output.say("equal: nothing is further from base + adapter than rounding explains")
    return 0


def _by_units(one: Difference) -> float:
    return -one.worst_units
