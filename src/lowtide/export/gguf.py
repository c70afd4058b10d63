"""What goes into GGUF files: a model, a model with an adapter folded in, or an adapter."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lowtide.data.gguf_tokenizer import PIPELINE_KEY
from lowtide.errors import LowtideWarning, OutputError
from lowtide.model.decoder import Decoder, load_model
from lowtide.model.families import read_config
from lowtide.weights.gguf.file import GgufFile, is_gguf

from .gguf_adapter import WrittenAdapter, write_gguf_adapter
from .gguf_model import Written, write_gguf
from .gguf_tokenizer import tokenizer_metadata
from .merge_record import MERGES_KEY, MergeRecord
from .merged import Merged
from .peft import open_adapter

_MAGIC = b"GGUF"
_STORED = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
Said = Callable[[str], None]


def export_adapter(
    model: str | Path,
    adapter_path: str | Path,
    out: str | Path,
    *,
    dtype: str = "f32",
    overwrite: bool = False,
) -> WrittenAdapter:
    """Write an adapter as llama.cpp's LoRA file: what `lowtide export gguf` does.

    Args:
        model: the adapter's base, a model directory, a GGUF file or a hub id.
        adapter_path: a PEFT adapter directory.
        out: the file.
        dtype: `f32` or `f16`.
        overwrite: whether a GGUF file of that name may be replaced.

    Returns:
        What was written.

    Raises:
        ModelError: the model cannot be used, or llama.cpp does not know its family.
        AdapterError: the adapter cannot be used, does not fit the model, or llama.cpp has none
            like it.
        OutputError: `out` cannot be written, or holds something else.
    """
    path = Path(out).expanduser()
    check_file(path, overwrite)
    decoder = load_model(model, "float64")
    adapter = open_adapter(Path(adapter_path).expanduser(), decoder)
    return write_gguf_adapter(path, decoder, adapter, dtype)


def export_model(
    model: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    said: Said = lambda text: None,
) -> Written:
    """Write a model as a GGUF file: what `lowtide export gguf` does without an adapter.

    Args:
        model: a model directory, a GGUF file or a hub id.
        out: the file.
        dtype: a key of `GGUF_DTYPES`; None takes what the matrices are stored as, of quantised
            ones f16.
        overwrite: whether a GGUF file of that name may be replaced.
        said: told of progress.

    Returns:
        What was written.

    Raises:
        ModelError: the model cannot be used, or llama.cpp cannot express it.
        OutputError: `out` cannot be written, or holds something else.
    """
    path = Path(out).expanduser()
    decoder = load_model(model, "float64")
    check_file(path, overwrite, decoder.checkpoint.files)
    kind = dtype or gguf_dtype(decoder)
    record = MergeRecord.of(decoder)
    said(f"writing {decoder.spec.n_parameters:,} parameters as {kind} to {path}")
    content = record.content(None, []) if record.merges else None
    return write_merged(path, Merged(decoder, None), kind, content)


def write_merged(path: Path, merged: Merged, dtype: str, record: bytes | None) -> Written:
    """Write a model, with what is folded into it, as a GGUF file.

    Args:
        path: the file.
        merged: what is written.
        dtype: a key of `GGUF_DTYPES`.
        record: of what was merged into it, which the file says.

    Returns:
        What was written.
    """
    model = merged.model
    metadata = _tokenizer_of(model)
    if record is not None:
        metadata[MERGES_KEY] = record.decode()
    return write_gguf(path, read_config(model.directory), merged.tensor, dtype, metadata)


def _tokenizer_of(model: Decoder) -> dict[str, Any]:
    """The metadata of a model's tokenizer, and of none where it has none, which is told.

    Args:
        model: with its directory.

    Returns:
        Keys and values.

    Raises:
        ModelError: llama.cpp has no tokenizer that works in the same way.
    """
    if is_gguf(model.path):  # as it is: what a file says of its tokenizer needs no other words
        held = GgufFile.open(model.path).metadata
        keys = [key for key in held if key.startswith("tokenizer.") or key == PIPELINE_KEY]
        return {key: held[key] for key in keys}
    if (model.directory / "tokenizer.json").is_file():
        return tokenizer_metadata(model.directory, model.spec.vocab_size)
    warnings.warn(
        f"{model.directory} has no tokenizer.json, so the GGUF file has no tokenizer: llama.cpp "
        "takes and gives token ids only.",
        LowtideWarning,
        stacklevel=4,
    )
    return {"tokenizer.ggml.model": "none"}


def gguf_dtype(model: Decoder) -> str:
    """What a GGUF file of a model holds where nobody says: as stored, of quantised matrices f16."""
    linear = model.spec.linears[0]
    stored = model.checkpoint.stored_as(f"model.layers.0.{linear}.weight")
    return _STORED.get(stored, "f16")


def check_file(path: Path, overwrite: bool, sources: Sequence[Path] = ()) -> None:
    """Refuse a file that cannot become a GGUF file.

    Args:
        path: the file.
        overwrite: whether a GGUF file that is there may be replaced.
        sources: files that are read, which must not be replaced.

    Raises:
        OutputError: says why.
    """
    if path.is_dir():
        raise OutputError(f"--out {path} is a directory; name a file in it, such as model.gguf.")
    if not path.exists():
        return
    with open(path, "rb") as file:
        begins = file.read(len(_MAGIC))
    if begins != _MAGIC:
        raise OutputError(f"--out {path} is a file that is no GGUF file. Choose another name.")
    if any(source.exists() and path.samefile(source) for source in sources):
        raise OutputError(f"--out {path} is read for this. Choose another name.")
    if not overwrite:
        raise OutputError(
            f"--out {path} exists already. Choose another name, or replace it with --overwrite."
        )
