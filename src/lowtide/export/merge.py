"""Fold an adapter into its model's weights: a Hugging Face directory, streamed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lowtide.errors import LowtideWarning
from lowtide.model.decoder import load_model
from lowtide.weights.checkpoint import Checkpoint
from lowtide.weights.manifest import Manifest
from lowtide.weights.whole import check_free_space, whole_directory
from lowtide.weights.writer import write_synced

from .merge_record import MERGE_FILE, MergeEntry, MergeRecord, check_out, trained_on
from .merged import Merged
from .model_directory import ModelWriter
from .peft import open_adapter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Said = Callable[[str], None]


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        out: where the merged model is.
        dtypes: of its tensors.
        written_bytes: of its files.
        update_errors: by name of every tensor that the adapter is on, what rounding to the dtype
            changed relative to what the adapter changed; None where that is nothing.
        base_errors: by name of every matrix of a quantised base, the relative error that
            quantising had made, which stays in the merged model.
    """

    out: Path
    dtypes: list[str]
    written_bytes: int
    update_errors: dict[str, float | None]
    base_errors: dict[str, float]


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
    """Write a model directory with an adapter folded into the weights: what `lowtide merge` does.

    Args:
        model: a model directory or a hub id.
        adapter_path: a PEFT adapter directory.
        out: the new model directory.
        dtype: `float32`, `bfloat16` or `float16`; None keeps each tensor's, and of a quantised
            model takes that of its norms.
        quantize: as in `load_model`: merge into the quantised weights, dequantised.
        overwrite: whether a merged model in `out` may be replaced.
        said: told of progress.

    Returns:
        What was done.

    Raises:
        ConfigError: weights are too large for the dtype.
        ModelError: the model cannot be used, or has the adapter in it already.
        AdapterError: the adapter cannot be used, or does not fit the model.
        OutputError: `out` cannot be written, or holds something else.
    """
    place, directory = Path(out).expanduser(), Path(adapter_path).expanduser()
    decoder = load_model(model, "float64", quantize)
    check_out(place, [decoder.directory, directory], overwrite)
    adapter = open_adapter(directory, decoder)
    record = MergeRecord.read(decoder.directory)
    writer = ModelWriter(decoder, Merged(decoder, adapter), DTYPES[dtype] if dtype else None)
    given = (str(model), str(adapter_path))
    entry = MergeEntry.of(decoder, adapter, given, " and ".join(writer.dtypes()))
    record.refuse_twice(entry, decoder.directory)
    _warn_of_other_weights(directory, entry)
    check_free_space(place, writer.nbytes)
    said(
        f"merging {adapter.config.in_words()} on {len(writer.merged.adapted)} linears into "
        f"{decoder.directory}: {writer.nbytes / 1e6:,.1f} MB of {entry.dtype} to {place}"
    )
    with whole_directory(place, replaces=overwrite) as hidden:
        check_out(place, [], overwrite)  # nobody else writes there now
        writer.write(hidden)
        files = [path.name for path in hidden.iterdir()]
        write_synced(hidden / MERGE_FILE, [record.content(entry, files)])
        decoder.checkpoint.check_unchanged()
    update_errors = {name: writer.roundings[name].relative for name in writer.merged.adapted}
    if all(error is None for error in update_errors.values()):
        warnings.warn(
            f"the adapter in {directory} changes nothing (B is zero, as before training); the "
            "merged model is the base.",
            LowtideWarning,
            stacklevel=2,
        )
    held = decoder.checkpoint
    manifest = Manifest.find(held.directory) if isinstance(held, Checkpoint) else None
    return MergeReport(
        place,
        writer.dtypes(),
        writer.nbytes,
        update_errors,
        {} if manifest is None else manifest.relative_rms_errors,
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
