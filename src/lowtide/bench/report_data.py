"""Reads a results directory ("lowtide-bench/1") for the report, and checks every file in it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowtide.errors import DataError, LowtideError, listed
from lowtide.model.adapter import ALL_LINEAR
from lowtide.model.spec import SEPARATE

from .results import GROUPS, label, read_result

_SETTING_NAMES = ("batch_size", "target_modules", "optimizer", "compute_dtype")
_ELEMENT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Each:
    """A JSON object of any keys, whose values all look like `value`."""

    value: Any


# What the report reads of a result, by kind: float stands for any finite number.
_PEAKS = {"peak_anon_bytes": float, "wall_s": float, "cpu_s": float}
_RESULTS: dict[str, dict[str, Any]] = {
    "step": {**_PEAKS, "peak_rss_bytes": float},
    "peer": _PEAKS,
    "quality": {
        "n_parameters": float,
        "overall": Each({"cosine": float, "expected": float}),
        "layers": [{"layer": float, "cosine": Each(float)}],
    },
    "convergence": {"curve": [{"step": float, "wall_s": float}]},
    "timeline": {
        "kinds": [str],
        "samples": [{"t_s": float, "rss_anon_bytes": float, "bytes": Each(float)}],
        "peak": {
            "t_s": float,
            "where": str,
            "rss_anon_bytes": float,
            "sum_bytes": float,
            "bytes": Each(float),
        },
    },
}
KINDS = tuple(_RESULTS)


@dataclass(frozen=True)
class Case:
    """One case file.

    Attributes:
        name: the stem of its file, and so unique.
        group: one of GROUPS.
        kind: one of KINDS.
        status: `done`, `failed` or `skipped`.
        error: why it failed or was skipped.
        settings: what was to be measured.
        environment: where.
        started: ISO time, or empty.
        result: what was measured; empty unless done.
    """

    name: str
    group: str
    kind: str
    status: str
    error: str
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    started: str
    result: Mapping[str, Any]

    @property
    def done(self) -> bool:
        """Whether there is a result."""
        return self.status == "done"

    @property
    def reason(self) -> str:
        """`failed: why`, in one short line."""
        first = (self.error.strip() or "no reason was recorded").splitlines()[0]
        return f"{self.status}: {first if len(first) <= 140 else first[:139] + '…'}"

    @property
    def file_name(self) -> str:
        """The name with only such characters as file names and links take."""
        return re.sub(r"[^\w.-]+", "-", self.name)

    @property
    def model(self) -> str:
        """The shape's name, or the last part of the model's path."""
        named = self.settings.get("shape") or self.settings.get("model")
        named = named or self.result.get("model") or "unnamed model"
        return Path(str(named)).name

    @property
    def method(self) -> str:
        """The label used in tables and plots: `mesp`, `mebp full`, `mesp store-h`, a peer."""
        get = self.setting
        if peer := get("peer"):
            switch = {True: ", checkpointing", False: ", no checkpointing"}
            return f"{peer}{switch.get(get('checkpointing'), '')}"
        named = {**self.settings, "method": get("method") or self.name}
        return label(named) + (", inputs in a file" if get("block_inputs") == "file" else "")

    def setting(self, name: str) -> Any:
        """A setting of the case, or of its result where only that names it."""
        return self.settings.get(name, self.result.get(name))

    def number(self, name: str) -> float | None:
        """A figure of the result, None where it has none."""
        value = self.result.get(name)
        return float(value) if value is not None and _is_number(value) else None

    @property
    def seq_len(self) -> int:
        """T; 0 where the case names none."""
        return int(self.setting("seq_len") or 0)

    @property
    def rank(self) -> int:
        """r; 0 where the case names none."""
        return int(self.setting("lora_r") or 0)

    def shared(self, *varying: str) -> tuple[Any, ...]:
        """What two cases must have in common to be compared, but for the `varying` settings."""
        own = {"model": self.model, "seq_len": self.seq_len, "lora_r": self.rank}
        own |= {name: self.setting(name) for name in _SETTING_NAMES}
        return tuple(str(value) for name, value in own.items() if name not in varying)

    def h_bytes(self) -> tuple[int, str] | None:
        """The bytes of every `h = x A^T` of a step and the product that they are.

        Returns:
            None where the number of layers is not known.
        """
        layers = num_layers(self)
        if layers is None or not self.seq_len or not self.rank:
            return None
        targets = str(self.setting("target_modules") or ALL_LINEAR)
        names = {name.strip() for name in targets.split(",")}
        linears = len(SEPARATE if names == {ALL_LINEAR} else names)
        tokens = self.seq_len * int(self.setting("batch_size") or 1)
        size = _ELEMENT_BYTES.get(str(self.setting("compute_dtype") or "float32"), 4)
        factors = (linears, layers, tokens, self.rank, size)
        return math.prod(factors), " x ".join(f"{factor:,}" for factor in factors)


def num_layers(case: Case) -> int | None:
    """Blocks of the case's model: from the case, a built-in shape, or a model directory."""
    given = case.setting("num_layers")
    if _is_number(given):
        return int(given)
    configs = Path(__file__).resolve().parent / "configs"
    places = [Path(str(case.settings.get("model") or ".")) / "config.json"]
    if shape := case.settings.get("shape"):
        places.insert(0, configs / f"{Path(str(shape)).name}.json")
    for place in places:
        try:
            return int(json.loads(place.read_text(encoding="utf-8"))["num_hidden_layers"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


@dataclass(frozen=True)
class Results:
    """All cases of a directory, by name."""

    directory: Path
    cases: tuple[Case, ...]

    def group(self, name: str) -> list[Case]:
        """The cases of a group, in the order of their names."""
        return [case for case in self.cases if case.group == name]

    def steps(self) -> list[Case]:
        """Every measured step, of any group."""
        return [case for case in self.cases if case.kind == "step" and case.done]

    def with_shared(self, group: str, varying: str) -> list[Case]:
        """A sweep: its own cases, and those of `models` that are points of it.

        Args:
            group: of the sweep.
            varying: the setting that it varies.

        Returns:
            Cases of kind step.
        """
        own = [case for case in self.group(group) if case.kind == "step"]
        sweeps = {case.shared(varying) for case in own}
        present = {(case.shared(), case.method) for case in own}
        also = [
            case
            for case in self.group("models")
            if case.kind == "step"
            and case.shared(varying) in sweeps
            and (case.shared(), case.method) not in present
        ]
        return own + also

    def baseline(self, case: Case, method: str = "mebp full") -> Case | None:
        """The same case measured with another method; the case's own group comes first."""
        found = [s for s in self.steps() if s.method == method and s.shared() == case.shared()]
        return min(found, key=lambda other: other.group != case.group, default=None)


def read_results(directory: Path) -> Results:
    """Read and check every case file.

    Args:
        directory: holds `cases/*.json`.

    Returns:
        The cases.

    Raises:
        DataError: there is no such directory, it holds no cases, or a file in it is broken, of
            another version or lacks something; all such files are named.
    """
    if not directory.is_dir():
        found = "is a file" if directory.exists() else "does not exist"
        raise DataError(
            f"{directory} {found}; expected a directory of results that `lowtide bench` wrote."
        )
    paths = sorted((directory / "cases").glob("*.json"))
    if not paths:
        raise DataError(
            f"{directory} holds no results: no file matches cases/*.json. Expected a directory "
            "that `lowtide bench paper` or `lowtide bench peers` wrote."
        )
    cases: list[Case] = []
    problems: list[str] = []
    for path in paths:
        try:
            cases.append(_read_case(path))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(f"results in {directory} cannot be used:\n{listed(problems)}")
    return Results(directory, tuple(cases))


def _read_case(path: Path) -> Case:
    read = read_result(path)
    problems = [
        f"{key} is {value!r}; expected one of {', '.join(known)}"
        for key, value, known in (("group", read.group, GROUPS), ("kind", read.kind, KINDS))
        if value not in known
    ]
    if not problems and read.status == "done":
        problems = list(_misfits(read.result, _RESULTS[read.kind], "result"))
    if problems:
        raise DataError(f"{path}: {'; '.join(problems[:4])}")
    result = read.result if read.status == "done" and read.result else {}
    case = Case(
        name=path.stem,
        group=read.group,
        kind=read.kind,
        status=read.status,
        error=str(read.error or ""),
        settings=read.case,
        environment=read.environment,
        started=read.started,
        result=result,
    )
    try:  # what tables are ordered by must be what it should be
        case.shared(), case.h_bytes()
    except (TypeError, ValueError, LowtideError) as error:
        raise DataError(f"{path}: its settings cannot be used: {error}") from error
    return case


def _misfits(value: Any, expected: Any, where: str) -> Iterator[str]:
    """Where `value` is not what `expected` describes, one text each."""
    if isinstance(expected, dict | Each) and not isinstance(value, dict):
        yield f"{where or 'the file'} is {_shown(value)}; expected an object"
    elif isinstance(expected, Each):
        for key, one in value.items():
            yield from _misfits(one, expected.value, f"{where}.{key}")
    elif isinstance(expected, dict):
        for key, inner in expected.items():
            yield from _misfits(value.get(key), inner, f"{where}.{key}".lstrip("."))
    elif isinstance(expected, list):
        if not isinstance(value, list) or not value:
            yield f"{where} is {_shown(value)}; expected a list that is not empty"
        else:
            for place, one in enumerate(value):
                yield from _misfits(one, expected[0], f"{where}[{place}]")
    elif expected is float and not _is_number(value):
        yield f"{where} is {_shown(value)}; expected a number"
    elif expected is str and not isinstance(value, str):
        yield f"{where} is {_shown(value)}; expected text"


def _is_number(value: Any) -> bool:
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return numeric and math.isfinite(value)


def _shown(value: Any) -> str:
    if value is None:
        return "missing"
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
