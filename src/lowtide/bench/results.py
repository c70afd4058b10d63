"""Results of measured cases: one versioned JSON file each, written in one piece."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowtide.errors import DataError, OutputError
from lowtide.weights.writer import write_atomically

FORMAT = "lowtide-bench/1"
GROUPS = (
    "models",
    "sequence",
    "rank",
    "store_h",
    "quality",
    "convergence",
    "timeline",
    "peers",
)
STATUSES = ("done", "failed", "skipped")
_KEYS = {
    "name": str,
    "group": str,
    "kind": str,
    "status": str,
    "case": dict,
    "environment": dict,
    "started": str,
}


@dataclass(frozen=True)
class CaseResult:
    """What one file of `cases/` holds."""

    name: str
    group: str
    kind: str
    status: str
    error: str | None
    case: dict[str, Any]
    environment: dict[str, Any]
    started: str
    result: dict[str, Any] | None

    def document(self) -> dict[str, Any]:
        """As it is written."""
        return {"format": FORMAT, **asdict(self)}


def label(case: Mapping[str, Any]) -> str:
    """What tables call the method of a case.

    Args:
        case: its settings.

    Returns:
        `mesp`, `mesp store-h`, `mebp sweep`, `mebp full`, `mezo`, `lcsb` or `autograd`.
    """
    method = str(case["method"])
    if method == "mebp":
        return f"mebp {case.get('mebp_loss', 'sweep')}"
    if method == "mesp" and case.get("recompute_h") is False:
        return "mesp store-h"
    return method


def case_path(directory: Path, name: str) -> Path:
    """The file of the case of that name."""
    return directory / "cases" / f"{name}.json"


def make_directory(directory: Path) -> None:
    """Make a results directory where there is none, and see that it can be written.

    Args:
        directory: of the results.

    Raises:
        OutputError: it cannot be made or written.
    """
    cases = directory / "cases"
    try:
        cases.mkdir(parents=True, exist_ok=True)
        if not os.access(cases, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise OutputError(
            f"--out {directory} cannot be written: {error.strerror}. Choose a directory that you "
            "own, on a disk with free space."
        ) from error


def write_result(directory: Path, result: CaseResult) -> None:
    """Write one case's file, replacing what it held.

    Args:
        directory: of the results; made where it does not exist.
        result: what to write.

    Raises:
        OutputError: the directory cannot be written, or the disk is full.
    """
    path = case_path(directory, result.name)
    make_directory(directory)
    text = json.dumps(result.document(), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(path, [(text + "\n").encode()])


def read_result(path: Path) -> CaseResult:
    """Read and check one file.

    Args:
        path: of a case.

    Returns:
        The case and its result.

    Raises:
        DataError: it cannot be read, is of another format version, or a key is missing.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path} cannot be read as a result of `lowtide bench` ({error}). Remove it, and the "
            "next run measures its case again."
        ) from error
    found = document.get("format") if isinstance(document, dict) else None
    if found != FORMAT:
        raise DataError(
            f"{path} has format {found!r}; this version of lowtide reads {FORMAT!r}. Measure again "
            "into another directory, or read it with the version that wrote it."
        )
    wrong = [key for key, kind in _KEYS.items() if not isinstance(document.get(key), kind)]
    if document.get("status") not in STATUSES:
        wrong.append("status")
    if document.get("status") == "done" and not isinstance(document.get("result"), dict):
        wrong.append("result")
    if wrong:
        raise DataError(
            f"{path} lacks or has unusable {', '.join(dict.fromkeys(wrong))}. Remove it, and the "
            "next run measures its case again."
        )
    keys = (*_KEYS, "error", "result")
    return CaseResult(**{key: document.get(key) for key in keys})


def read_results(path: Path) -> dict[str, CaseResult]:
    """All results of a directory, or the one of a file, by name.

    Args:
        path: a results directory, its `cases`, or one case's file.

    Returns:
        The results, sorted by name.

    Raises:
        DataError: there is none, or one cannot be read.
    """
    if path.is_file():
        files = [path]
    else:
        inner = path / "cases"
        files = sorted((inner if inner.is_dir() else path).glob("*.json"))
    if not files:
        found = "holds no results" if path.exists() else "does not exist"
        raise DataError(
            f"{path} {found}; give a directory that `lowtide bench paper --out` wrote, or one file "
            "of its cases."
        )
    return {result.name: result for result in map(read_result, files)}


def file_name(*parts: object) -> str:
    """A case's name out of its parts: lower case, joined by dashes, safe as a file name."""
    text = "-".join(str(part) for part in parts)
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower().replace("_", "-")).strip("-")
