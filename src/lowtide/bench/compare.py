"""`lowtide bench compare A B`: the same cases of two runs, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowtide.config import setting
from lowtide.environment import differences
from lowtide.errors import DataError, listed

from .results import CaseResult, read_results


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """Settings of `lowtide bench compare`."""

    before: str = setting(help="results directory, or one file of its cases", filled=True)
    after: str = setting(help="the results to hold beside them", filled=True)
    force: bool = setting(
        False, help="compare although the machine or the versions of the libraries differ"
    )


def bench_compare(settings: CompareSettings) -> dict[str, Any]:
    """Hold two runs' results side by side.

    Args:
        settings: of the command.

    Returns:
        `cases` (name, and for each figure `before`, `after`, `ratio` = after / before),
        `only_before`, `only_after`, `not_done` and `environment_differences`.

    Raises:
        DataError: a file is of another format version, cases of one name differ in their
            settings, the environments differ (without `force`), or no case is in both.
    """
    before = read_results(Path(settings.before).expanduser())
    after = read_results(Path(settings.after).expanduser())
    pairs = _pairs(before, after, settings)
    if not pairs:
        raise DataError(
            f"no case is in both {settings.before} ({_names(before)}) and {settings.after} "
            f"({_names(after)}); compare two runs of the same command."
        )
    problems = [text for one, other in pairs for text in _case_differences(one, other)]
    if problems:
        raise DataError(
            f"the cases are not the same, so their figures are not either:\n{listed(problems)}\n"
            "Measure both with the same settings."
        )
    found = {text: None for one, other in pairs for text in _environments(one, other)}
    if found and not settings.force:
        raise DataError(
            f"the results come from different environments:\n{listed(list(found))}\nMeasure both "
            "on one machine with the same versions, or compare nevertheless with --force."
        )
    done = [(one, other) for one, other in pairs if one.result and other.result]
    return {
        "before": settings.before,
        "after": settings.after,
        "cases": [_row(one, other) for one, other in done],
        "not_done": [
            f"{one.name}: {one.status} before, {other.status} after"
            for one, other in pairs
            if not (one.result and other.result)
        ],
        "only_before": [] if _two_files(settings) else sorted(set(before) - set(after)),
        "only_after": [] if _two_files(settings) else sorted(set(after) - set(before)),
        "environment_differences": list(found),
    }


def _two_files(settings: CompareSettings) -> bool:
    return all(Path(p).expanduser().is_file() for p in (settings.before, settings.after))


def _pairs(
    before: Mapping[str, CaseResult], after: Mapping[str, CaseResult], settings: CompareSettings
) -> list[tuple[CaseResult, CaseResult]]:
    """Cases of one name; two files are a pair whatever their names."""
    if _two_files(settings):
        return list(zip(before.values(), after.values(), strict=True))
    return [(before[name], after[name]) for name in before if name in after]


def _names(results: Mapping[str, CaseResult]) -> str:
    names = list(results)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _case_differences(one: CaseResult, other: CaseResult) -> list[str]:
    left = {"kind": one.kind, **one.case}
    right = {"kind": other.kind, **other.case}
    return [
        f"{one.name}: {key} = {left.get(key)!r} and {right.get(key)!r}"
        for key in {**left, **right}
        if left.get(key) != right.get(key)
    ]


def _environments(one: CaseResult, other: CaseResult) -> list[str]:
    return differences(one.environment, other.environment)


def _row(one: CaseResult, other: CaseResult) -> dict[str, Any]:
    left, right = figures(one), figures(other)
    rows = {
        name: {
            "before": left[name],
            "after": right[name],
            "ratio": right[name] / left[name] if left[name] else None,
        }
        for name in left
        if name in right
    }
    return {"name": one.name, "figures": rows}


def figures(result: CaseResult) -> dict[str, float]:
    """The numbers of a case that say how it did.

    Args:
        result: of a case that is done.

    Returns:
        Figures by name: bytes, seconds, losses, cosines, as its kind has them.
    """
    one = result.result or {}
    found: dict[str, Any] = {
        name: one[name] for name in ("peak_anon_bytes", "wall_s", "cpu_s") if name in one
    }
    if "peak" in one:
        found["peak_rss_anon_bytes"] = one["peak"]["rss_anon_bytes"]
    if one.get("curve"):
        found["last_loss"] = one["curve"][-1]["loss"]
    for count, cosine in one.get("overall", {}).items():
        found[f"cosine_{count}"] = cosine["cosine"]
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def compare_lines(result: Mapping[str, Any]) -> list[str]:
    """The comparison as a table for people.

    Args:
        result: of `bench_compare`.

    Returns:
        Its lines.
    """
    width = max((len(case["name"]) for case in result["cases"]), default=4)
    lines = [f"{'case':<{width}}  {'figure':<20}{'before':>14}{'after':>14}{'ratio':>8}"]
    for case in result["cases"]:
        for name, row in case["figures"].items():
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
            lines.append(
                f"{case['name']:<{width}}  {name:<20}{_shown(name, row['before']):>14}"
                f"{_shown(name, row['after']):>14}{ratio:>8}"
            )
    for key, text in (("only_before", "only before"), ("only_after", "only after")):
        lines += [f"{text}: {name}" for name in result[key]]
    lines += [f"no figures: {text}" for text in result["not_done"]]
    lines += [f"different environment: {text}" for text in result["environment_differences"]]
    return lines


def _shown(name: str, value: float) -> str:
    if name.endswith("_bytes"):
        return f"{value / 1e6:,.1f} MB"
    return f"{value:.2f} s" if name.endswith("_s") else f"{value:.4f}"
