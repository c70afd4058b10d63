"""`lowtide quantize`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowtide.config import setting
from lowtide.errors import ConfigError
from lowtide.model.quantized import quantize_model, verify_model
from lowtide.weights.manifest import Manifest
from lowtide.weights.storages import STORAGES

from .output import Output, megabytes, settings_of

_DESCRIPTION = (
    "Write a quantised copy of a model, `lowtide quantize MODEL OUT`: an ordinary model directory "
    "for --model. Matrices (linears, embeddings, head) are quantised, norms and biases copied. "
    "After an interruption the same command goes on where it ended. `lowtide quantize OUT "
    "--verify` reads a quantised model and compares its checksums."
)
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class QuantizeSettings:
    """Settings of `lowtide quantize`."""

    model: str = setting(help="model directory, or a Hugging Face hub id", filled=True)
    out: str | None = setting(None, help="directory to write the quantised model to", filled=True)
    quantize: str = setting("int4", help="storage of the matrices", choices=tuple(STORAGES))
    overwrite: bool = setting(False, help="replace the quantised model that OUT already holds")
    verify: bool = setting(False, help="only verify the checksums of the quantised model MODEL")


def run(argv: Sequence[str]) -> int:
    """Quantise or verify; print the errors of the matrices."""
    names = [a for a in argv[:2] if not a.startswith("-")]
    if argv and argv[0].startswith("-"):
        names = []
    flags = [part for pair in zip(("--model", "--out"), names, strict=False) for part in pair]
    settings, output = settings_of(
        QuantizeSettings, "quantize", _DESCRIPTION, [*flags, *argv[len(names) :]]
    )
    directory = Path(settings.model if settings.verify else settings.out or "").expanduser()
    if settings.verify:
        manifest = verify_model(directory)
        output.say(f"verified: all {len(manifest.checksums)} tensors are as they were written")
    elif settings.out is None:
        raise ConfigError(
            "OUT is missing: give the directory to write to, `lowtide quantize MODEL OUT`."
        )
    else:
        manifest = quantize_model(
            settings.model, directory, settings.quantize,
            overwrite=settings.overwrite, said=output.say,
        )  # fmt: skip
    _say(manifest, directory, output)
    output.result(
        {
            "out": str(directory),
            "storage": manifest.storage,
            "source_bytes": sum(one.bytes for one in manifest.source),
            "weights_bytes": manifest.weights_bytes,
            "relative_rms_errors": manifest.relative_rms_errors,
        }
    )
    return 0


def _say(manifest: Manifest, directory: Path, output: Output) -> None:
    before = sum(one.bytes for one in manifest.source)
    output.say(
        f"{directory}: {manifest.storage}, {megabytes(manifest.weights_bytes)} from "
        f"{megabytes(before)}"
    )
    worst = sorted(manifest.relative_rms_errors.items(), key=lambda item: -item[1])
    output.say(f"relative RMS error of {len(worst)} matrices, the largest first:")
    for name, error in worst[:_SHOWN]:
        output.say(f"  {error:8.3%}  {name}")
    if len(worst) > _SHOWN:
        output.say(f"  ... down to {worst[-1][1]:.3%}")
