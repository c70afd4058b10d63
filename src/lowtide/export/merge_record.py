"""What a merged model says of its making: lowtide_merge.json beside its weights."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lowtide.errors import ModelError, OutputError
from lowtide.model.adapter import Adapter
from lowtide.model.decoder import Decoder
from lowtide.train.checkpoints import FOLDER, STATE_FILE, file_checksum
from lowtide.train.fingerprint import model_fingerprint, version
from lowtide.train.output import BEST_FOLDER
from lowtide.weights.gguf.file import GgufFile, is_gguf

from .peft import WEIGHTS_FILE, adapter_config

MERGE_FILE, MERGES_KEY = "lowtide_merge.json", "lowtide.merges"
_FORMAT = 1
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class MergeEntry:
    """One merge: what was merged into what.

    Attributes:
        merged_at: time, ISO 8601 in UTC.
        lowtide: the version.
        base: the model: its `path`, `fingerprint`, and what it is `stored_as`.
        adapter: its `path`, the `sha256` of its weights, and its `config`, as PEFT has it.
        dtype: of the result.
    """

    merged_at: str
    lowtide: str
    base: dict[str, Any]
    adapter: dict[str, Any]
    dtype: str

    @classmethod
    def of(cls, model: Decoder, adapter: Adapter, given: tuple[str, str], dtype: str) -> MergeEntry:
        """The entry of a merge that is about to be made.

        Args:
            model: the base.
            adapter: as it was opened.
            given: the model and the adapter's directory as the user named them: a file that may be
                published says no more of the machine than that.
            dtype: of the result.

        Returns:
            The entry.
        """
        return cls(
            datetime.now(UTC).isoformat(timespec="seconds"),
            version(),
            {
                "path": given[0],
                "fingerprint": model_fingerprint(model),
                "stored_as": model.stored_dtypes,
            },
            {
                "path": given[1],
                "sha256": file_checksum(Path(given[1]).expanduser() / WEIGHTS_FILE),
                "config": adapter_config(adapter, None),
            },
            dtype,
        )


@dataclass(frozen=True)
class MergeRecord:
    """All merges that a model has behind it, the last one last, and the files it consists of."""

    merges: tuple[MergeEntry, ...] = ()
    files: tuple[str, ...] = ()

    @classmethod
    def read(cls, directory: Path) -> MergeRecord:
        """The record of a model directory; empty where nothing was merged into the model.

        Args:
            directory: any.

        Returns:
            The record.

        Raises:
            ModelError: there is one that cannot be used.
        """
        path = directory / MERGE_FILE
        return cls._parsed(path, path.read_bytes()) if path.is_file() else cls()

    @classmethod
    def of(cls, model: Decoder) -> MergeRecord:
        """The record of a model, in its directory or in the metadata of its GGUF file.

        Args:
            model: any.

        Returns:
            The record.

        Raises:
            ModelError: there is one that cannot be used.
        """
        if not is_gguf(model.path):
            return cls.read(model.directory)
        text = GgufFile.open(model.path).metadata.get(MERGES_KEY)
        return cls() if text is None else cls._parsed(model.path, text)

    @classmethod
    def _parsed(cls, path: Path, text: Any) -> MergeRecord:
        try:
            held = json.loads(text)
            if held["format"] != _FORMAT:
                raise ValueError("a newer lowtide wrote it")
            merges = tuple(MergeEntry(**one) for one in held["merges"])
            for one in merges:
                str.encode(one.adapter["sha256"])
                str.encode(one.adapter["path"])
                str.encode(one.base["path"])
            files = tuple(Path(name).name for name in held["files"])
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"what {path} says of merges cannot be used ({error}). It says which adapters are "
                "in the model already; take the model from where it was written, or merge again."
            ) from error
        return cls(merges, files)

    def refuse_twice(self, entry: MergeEntry, model: Path) -> None:
        """Refuse an adapter that is in the model already.

        Args:
            entry: the merge to be made.
            model: its directory or file.

        Raises:
            ModelError: says when it was merged, and from where.
        """
        for one in self.merges:
            if one.adapter["sha256"] == entry.adapter["sha256"]:
                raise ModelError(
                    f"{model} has this adapter in it already: it was merged on "
                    f"{one.merged_at} from {one.adapter['path']}. Merged twice, it would count "
                    f"double. Use the model as it is, or merge into its base, {one.base['path']}."
                )

    def content(self, entry: MergeEntry | None, files: Sequence[str]) -> bytes:
        """The record after one more merge, if there is one, of these files."""
        merges = self.merges if entry is None else (*self.merges, entry)
        document = {
            "format": _FORMAT,
            "files": sorted(files),
            "merges": [asdict(one) for one in merges],
        }
        return (json.dumps(document, indent=2) + "\n").encode()


def check_out(out: Path, sources: Sequence[Path], overwrite: bool) -> None:
    """Refuse a directory that cannot become the merged model.

    Args:
        out: the directory.
        sources: the model's and the adapter's, which must not lie in it.
        overwrite: whether a merged model that it holds may be replaced.

    Raises:
        OutputError: says why.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out} is a file; name a directory for the merged model.")
    if out.is_symlink() and not out.exists():
        raise OutputError(f"--out {out} is a link to what does not exist. Choose another.")
    for source in sources:
        if out.resolve() in (source.resolve(), *source.resolve().parents):
            raise OutputError(
                f"--out {out} is, or holds, {source}, which is read for the merge. Name another "
                "directory."
            )
    held = {path.name for path in out.iterdir()} if out.exists() else set()
    if not held:
        return
    others = sorted(held - set(MergeRecord.read(out).files))
    if others:
        raise OutputError(
            f"--out {out} holds files that `lowtide merge` did not write ({', '.join(others[:3])})."
            " Name another directory."
        )
    if not overwrite:
        raise OutputError(
            f"--out {out} already holds a merged model. Choose another directory, replace it with "
            "--overwrite, or compare it with --check."
        )


def trained_on(directory: Path) -> str | None:
    """The fingerprint of the model that a run trained an adapter on, where its files tell.

    Args:
        directory: of a run, its `best`, or one of its checkpoints.

    Returns:
        The fingerprint; None for an adapter that is of no run.
    """
    run = directory.parent if directory.name == BEST_FOLDER else directory
    states = [directory / STATE_FILE]
    if (run / FOLDER).is_dir():
        steps = [path for path in (run / FOLDER).iterdir() if _STEP.fullmatch(path.name)]
        newest = sorted(steps, key=lambda path: int(path.name.split("-")[1]), reverse=True)
        states += [path / STATE_FILE for path in newest]
    for path in states:
        try:
            found = json.loads(path.read_bytes())["state"]["fingerprints"]["model"]
        except (OSError, ValueError, RecursionError, KeyError, TypeError):
            continue
        if isinstance(found, str):
            return found
    return None
