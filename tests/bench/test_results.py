"""Result files, and two runs side by side."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small

from lowtide.bench.compare import CompareSettings, bench_compare
from lowtide.bench.results import (
    CaseResult,
    case_path,
    file_name,
    label,
    read_result,
    read_results,
    write_result,
)
from lowtide.environment import differences, environment, git_revision
from lowtide.errors import DataError

ONE = CaseResult(
    name="models-x-mesp",
    group="models",
    kind="step",
    status="done",
    error=None,
    case={"shape": "x", "method": "mesp", "seq_len": 256},
    environment={"lowtide": "0.1.0", "torch": "2.13", "cpu": "A", "git_revision": "abc"},
    started="2025-01-01T00:00:00+00:00",
    result={"peak_anon_bytes": 50_000_000, "wall_s": 4.0, "cpu_s": 8.0},
)


def written(directory: Path, **changes: Any) -> Path:
    write_result(directory, replace(ONE, **changes))
    return directory


def changed(path: Path, **changes: Any) -> Path:
    document = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(document))
    return path


def test_a_result_comes_back_as_it_was_written(tmp_path: Path) -> None:
    written(tmp_path)
    assert read_results(tmp_path) == {ONE.name: ONE}
    assert read_results(tmp_path / "cases") == {ONE.name: ONE}
    assert read_result(case_path(tmp_path, ONE.name)) == ONE
    document = json.loads(case_path(tmp_path, ONE.name).read_text())
    assert document["format"] == "lowtide-bench/1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "lowtide-bench/2"}, "has format 'lowtide-bench/2'; this .* 'lowtide-bench/1'"),
        ({"format": None}, "has format None"),
        ({"case": None, "status": "dnoe"}, "lacks or has unusable case, status"),
        ({"result": None}, "lacks or has unusable result"),
    ],
)
def test_another_format_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = changed(case_path(written(tmp_path), ONE.name), **change)
    with pytest.raises(DataError, match=message):
        read_result(path)


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_results(tmp_path / "absent")
    with pytest.raises(DataError, match="holds no results"):
        read_results(tmp_path)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as a result"):
        read_results(tmp_path)


def test_labels_and_names() -> None:
    assert label({"method": "mesp"}) == "mesp"
    assert label({"method": "mesp", "recompute_h": False}) == "mesp store-h"
    assert label({"method": "mebp"}) == "mebp sweep"
    assert label({"method": "mebp", "mebp_loss": "full"}) == "mebp full"
    assert label({"method": "mezo"}) == "mezo"
    assert file_name("store_h", "Qwen2.5-3b", "mebp full") == "store-h-qwen2.5-3b-mebp-full"


def compare(before: Path, after: Path, **more: Any) -> dict[str, Any]:
    return bench_compare(CompareSettings(before=str(before), after=str(after), **more))


def test_compare_shows_both_figures_and_the_ratio(tmp_path: Path) -> None:
    a, b = written(tmp_path / "a"), written(tmp_path / "b", environment={**ONE.environment})
    written(b, result={"peak_anon_bytes": 40_000_000, "wall_s": 5.0, "cpu_s": 8.0})
    written(a, name="gone")
    written(b, name="new")
    written(a, name="broken")
    written(b, name="broken", status="failed", error="no memory", result=None)
    result = compare(a, b)
    (case,) = result["cases"]
    assert case["name"] == ONE.name
    peak = case["figures"]["peak_anon_bytes"]
    assert peak == {"before": 50_000_000, "after": 40_000_000, "ratio": 0.8}
    assert case["figures"]["wall_s"]["ratio"] == 1.25
    assert (result["only_before"], result["only_after"]) == (["gone"], ["new"])
    assert result["not_done"] == ["broken: done before, failed after"]
    done = small.run("bench", "compare", a, b)
    assert done.code == 0
    assert done.out.splitlines()[1].split() == [
        ONE.name, "peak_anon_bytes", "50.0", "MB", "40.0", "MB", "0.800",
    ]  # fmt: skip
    assert "only before: gone" in done.out


def test_compare_refuses_other_settings_with_the_difference(tmp_path: Path) -> None:
    a = written(tmp_path / "a")
    b = written(tmp_path / "b", case={"shape": "x", "method": "mesp", "seq_len": 128})
    done = small.run("bench", "compare", a, b, "--force")
    assert done.code == 2
    assert "models-x-mesp: seq_len = 256 and 128" in done.err


def test_compare_refuses_other_environments_unless_forced(tmp_path: Path) -> None:
    a = written(tmp_path / "a")
    other = {**ONE.environment, "torch": "2.14", "cpu": "B", "git_revision": "def"}
    b = written(tmp_path / "b", environment=other)
    with pytest.raises(DataError, match=r"(?s)torch: 2.13 and 2.14\n.*cpu: A and B") as refusal:
        compare(a, b)
    assert "git_revision" not in str(refusal.value)
    assert compare(a, b, force=True)["environment_differences"] == [
        "torch: 2.13 and 2.14",
        "cpu: A and B",
    ]


def test_compare_refuses_another_format_version(tmp_path: Path) -> None:
    a, b = written(tmp_path / "a"), written(tmp_path / "b")
    changed(case_path(b, ONE.name), format="lowtide-bench/2")
    done = small.run("bench", "compare", a, b, "--force", "--json")
    assert done.code == 2
    assert "'lowtide-bench/2'" in done.document["error"]
    assert "'lowtide-bench/1'" in done.document["error"]


def test_compare_needs_a_common_case_but_for_two_files(tmp_path: Path) -> None:
    a, b = written(tmp_path / "a"), written(tmp_path / "b", name="other")
    with pytest.raises(DataError, match=r"no case is in both .*models-x-mesp.*other"):
        compare(a, b)
    pair = compare(case_path(a, ONE.name), case_path(b, "other"))
    assert pair["cases"][0]["figures"]["wall_s"]["ratio"] == 1.0


def test_the_environment_names_machine_and_versions(tmp_path: Path) -> None:
    one = environment()
    assert all(one[key] for key in one if key != "git_revision")
    assert differences(one, {**one, "git_revision": "another"}) == []
    assert differences(one, {**one, "cores": 99}) == [f"cores: {one['cores']} and 99"]
    assert git_revision(tmp_path / "untracked.py") is None
