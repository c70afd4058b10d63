"""`lowtide export gguf`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowtide.config import did_you_mean, setting
from lowtide.errors import ConfigError
from lowtide.export.gguf import export_adapter, export_model
from lowtide.export.gguf_adapter import ADAPTER_DTYPES
from lowtide.export.gguf_model import GGUF_DTYPES

from .output import Output, megabytes, settings_of

_DESCRIPTION = (
    "Write an adapter as llama.cpp's LoRA file, or without --adapter-path the model itself as a "
    "GGUF file. `lowtide merge --out model.gguf` writes both in one."
)
_PEFT = (
    "there is nothing to export: an adapter's directory is PEFT's already. Copy "
    "adapter_config.json and adapter_model.safetensors out of it, or give the directory to "
    "peft.PeftModel.from_pretrained as it is."
)
_FORMATS = ("gguf",)


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Settings of `lowtide export gguf`."""

    model: str = setting(help="model directory, GGUF file, or a Hugging Face hub id", filled=True)
    adapter_path: str | None = setting(
        None, help="PEFT adapter directory; none exports the model itself", filled=True
    )
    out: str = setting(help="file to write, *.gguf", filled=True)
    dtype: str | None = setting(
        None,
        help="of the matrices: f32 or f16 of an adapter (none: f32); f32, f16, bf16 or q8_0 of a "
        "model (none: as they are stored)",
        choices=tuple(GGUF_DTYPES),
    )
    overwrite: bool = setting(False, help="replace the GGUF file that --out names")


def run(argv: Sequence[str]) -> int:
    """Write a file; the first word says of which format."""
    if not argv or argv[0] in ("-h", "--help"):
        print(
            "usage: lowtide export gguf --model MODEL [--adapter-path DIR] --out FILE [flags]\n\n"
            f"{_DESCRIPTION}\n\nFor PEFT, {_PEFT}\n\nIt takes --help, --config FILE.yaml and "
            "--json."
        )
        return 0 if argv else 2
    if argv[0] == "peft":
        raise ConfigError(f"export peft: {_PEFT}")
    if argv[0] not in _FORMATS:
        raise ConfigError(
            f"unknown format {argv[0]!r}{did_you_mean(argv[0], _FORMATS)}. There is: export gguf."
        )
    settings, output = settings_of(ExportSettings, "export gguf", _DESCRIPTION, argv[1:])
    if settings.adapter_path is None:
        return _model(settings, output)
    return _adapter(settings, settings.adapter_path, output)


def _adapter(settings: ExportSettings, adapter_path: str, output: Output) -> int:
    if settings.dtype not in (None, *ADAPTER_DTYPES):
        raise ConfigError(
            f"--dtype {settings.dtype} is for models; an adapter's matrices are "
            f"{' or '.join(ADAPTER_DTYPES)}."
        )
    found = export_adapter(
        settings.model, adapter_path, settings.out,
        dtype=settings.dtype or "f32", overwrite=settings.overwrite,
    )  # fmt: skip
    output.say(
        f"{found.path}: {megabytes(found.nbytes)}, LoRA on {found.tensors} tensors of an "
        f"{found.architecture} model, alpha {found.alpha:g}"
    )
    if found.scaled:
        output.say(
            f"llama.cpp has one alpha for all: B of {len(found.scaled)} tensors was multiplied by "
            "what their scale differs by"
        )
    output.say(f"next  llama-cli -m MODEL.gguf --lora {found.path}")
    output.result({**found._asdict(), "path": str(found.path)})
    return 0


def _model(settings: ExportSettings, output: Output) -> int:
    found = export_model(
        settings.model, settings.out, dtype=settings.dtype, overwrite=settings.overwrite,
        said=output.say,
    )  # fmt: skip
    output.say(f"{found.path}: {megabytes(found.nbytes)}")
    if found.kept_f16:
        output.say(
            f"{len(found.kept_f16)} matrices stay f16, whose rows do not divide into blocks of 32"
        )
    output.say(f"next  llama-cli -m {found.path}")
    output.result({**found._asdict(), "path": str(found.path)})
    return 0
