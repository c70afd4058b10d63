"""Fold an adapter into its model's weights: a Hugging Face directory, streamed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lowtide.errors import ConfigError, LowtideWarning
from lowtide.model.adapter import Adapter
from lowtide.model.decoder import Decoder, load_model
from lowtide.weights.checkpoint import Checkpoint
from lowtide.weights.manifest import Manifest
from lowtide.weights.whole import check_free_space, whole_directory
from lowtide.weights.writer import write_synced

from .gguf import check_file, gguf_dtype, write_merged
from .merge_record import MERGE_FILE, MergeEntry, MergeRecord, check_out, trained_on
from .merged import Merged
from .model_directory import ModelWriter
from .peft import open_adapter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_OF_FILES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "q8_0": "q8_0"}
MERGE_DTYPES = tuple(_OF_FILES)
"""Of a directory all but the last; of a GGUF file its own name of each."""
GGUF_SUFFIX = ".gguf"
Said = Callable[[str], None]


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        out: where the merged model is.
        dtypes: of its matrices and vectors.
        written_bytes: of its files.
        update_errors: by name of every tensor that the adapter is on, what rounding to the dtype
            changed relative to what the adapter changed; None where that is nothing. Empty for a
            GGUF file.
        base_errors: by name of every matrix of a quantised base, the relative error that
            quantising had made, which stays in the merged model.
    """

    out: Path
    dtypes: list[str]
    written_bytes: int
    update_errors: dict[str, float | None]
    base_errors: dict[str, float]


@dataclass(frozen=True)
class _Work:
    """A merge that may be made: everything that can be known before it is, has been checked."""

    model: Decoder
    merged: Merged
    record: MergeRecord
    entry: MergeEntry
    said: Said

    def say(self, nbytes: int | None, place: Path) -> None:
        size = "" if nbytes is None else f"{nbytes / 1e6:,.1f} MB of "
        words = "" if self.merged.adapter is None else self.merged.adapter.config.in_words()
        self.said(
            f"merging {words} on {len(self.merged.adapted)} linears into "
            f"{self.entry.base['path']}: {size}{self.entry.dtype} to {place}"
        )


def merge(
    model: str | Path,
    adapter_path: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    overwrite: bool = False,
    said: Said = lambda text: None,
) -> MergeReport:
    """Write a model with an adapter folded into the weights: what `lowtide merge` does.

    Args:
        model: a model directory, a GGUF file or a hub id.
        adapter_path: a PEFT adapter directory.
        out: the new model directory, or a file whose name ends in `.gguf`.
        dtype: of MERGE_DTYPES; None keeps each tensor's, and of a quantised model takes that of
            its norms, or in a GGUF file f16.
        quantize: as in `load_model`: merge into the quantised weights, dequantised.
        overwrite: whether a merged model in `out` may be replaced.
        said: told of progress.

    Returns:
        What was done.

    Raises:
        ConfigError: weights are too large for the dtype, or `out` cannot hold it.
        ModelError: the model cannot be used, or has the adapter in it already.
        AdapterError: the adapter cannot be used, or does not fit the model.
        OutputError: `out` cannot be written, or holds something else.
    """
    place, directory = Path(out).expanduser(), Path(adapter_path).expanduser()
    is_file = place.suffix == GGUF_SUFFIX
    if dtype is not None and not is_file and dtype not in DTYPES:
        raise ConfigError(
            f"--dtype {dtype} is of GGUF files. Name one with --out, such as {place.name}.gguf, or "
            f"choose {', '.join(DTYPES)}."
        )
    decoder = load_model(model, "float64", quantize)
    if is_file:
        check_file(place, overwrite, decoder.checkpoint.files)
    else:
        check_out(place, [decoder.path, directory], overwrite)
    adapter = open_adapter(directory, decoder)
    merged = Merged(decoder, adapter)
    if is_file:
        kind = gguf_dtype(decoder) if dtype is None else _OF_FILES[dtype]
    else:
        writer = ModelWriter(decoder, merged, DTYPES[dtype] if dtype else None)
        kind = " and ".join(writer.dtypes())
    record = MergeRecord.of(decoder)
    entry = MergeEntry.of(decoder, adapter, (str(model), str(adapter_path)), kind)
    record.refuse_twice(entry, decoder.path)
    _warn_of_other_weights(directory, entry)
    _warn_of_nothing(directory, adapter)
    work = _Work(decoder, merged, record, entry, said)
    return _to_file(work, place) if is_file else _to_directory(work, writer, place, overwrite)


def _to_file(work: _Work, place: Path) -> MergeReport:
    kind = work.entry.dtype
    work.say(None, place)
    written = write_merged(place, work.merged, kind, work.record.content(work.entry, []))
    dtypes = [kind, *(["f16"] if written.kept_f16 else [])]
    return MergeReport(place, dtypes, written.nbytes, {}, _base_errors(work.model))


def _to_directory(work: _Work, writer: ModelWriter, place: Path, overwrite: bool) -> MergeReport:
    check_free_space(place, writer.nbytes)
    work.say(writer.nbytes, place)
    with whole_directory(place, replaces=overwrite) as hidden:
        check_out(place, [], overwrite)  # nobody else writes there now
        writer.write(hidden)
        files = [MERGE_FILE, *(path.name for path in hidden.iterdir())]
        write_synced(hidden / MERGE_FILE, [work.record.content(work.entry, files)])
        work.model.checkpoint.check_unchanged()
    update_errors = {name: writer.roundings[name].relative for name in work.merged.adapted}
    return MergeReport(
        place, writer.dtypes(), writer.nbytes, update_errors, _base_errors(work.model)
    )


def _base_errors(model: Decoder) -> dict[str, float]:
    held = model.checkpoint
    manifest = Manifest.find(held.directory) if isinstance(held, Checkpoint) else None
    return {} if manifest is None else manifest.relative_rms_errors


def _warn_of_nothing(directory: Path, adapter: Adapter) -> None:
    """An adapter as it is before training; under DoRA the magnitudes may still change something."""
    matrices = [p for name, p in adapter.items() if ".lora_B." in name]
    if not adapter.config.use_dora and not any(bool(matrix.any()) for matrix in matrices):
        warnings.warn(
            f"the adapter in {directory} changes nothing (B is zero, as before training); the "
            "merged model is the base.",
            LowtideWarning,
            stacklevel=3,
        )


def _warn_of_other_weights(directory: Path, entry: MergeEntry) -> None:
    made_on = trained_on(directory)
    if made_on is not None and made_on != entry.base["fingerprint"]:
        warnings.warn(
            f"the adapter in {directory} was trained on other weights than those of "
            f"{entry.base['path']} (or on the same ones in another storage: see model and quantize "
            "in its run.yaml), so the merged model is not the one that its training measured.",
            LowtideWarning,
            stacklevel=3,
        )
