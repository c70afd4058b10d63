"""The report of odd, incomplete and broken results, and the process that draws its plots."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import report_data as data
from report_pages import Page

from lowtide.bench import report as report_module
from lowtide.bench.report import report
from lowtide.bench.report_data import read_results
from lowtide.bench.report_paper import paper_figure
from lowtide.errors import InputError, LowtideError, OutputError


def test_missing_groups_say_so_in_one_line(tmp_path: Path) -> None:
    data.add_quality(tmp_path)
    html, markdown = report(tmp_path)
    page = Page(html.read_text("utf-8"))
    for text in (page.text, markdown.read_text("utf-8")):
        for group in ("models", "sequence", "rank", "store_h", "timeline", "convergence", "peers"):
            said = f"Not measured: this directory holds no case of group {group}."
            assert said in text.replace("`", "")
        assert "there is no ratio yet" in text
        assert "None: every case has a result." in text
    assert len(page.images) == 2


def test_only_failed_cases_still_make_a_report(tmp_path: Path) -> None:
    for kind, group in (
        ("step", "models"),
        ("step", "sequence"),
        ("step", "store_h"),
        ("timeline", "timeline"),
        ("quality", "quality"),
        ("convergence", "convergence"),
        ("peer", "peers"),
    ):
        settings = data.step_settings(data.SMALL, "mesp") | {"recompute_h": group != "store_h"}
        status = {"status": "failed", "error": "the disk is full"}
        data.write(tmp_path, f"bad-{group}", group, kind, settings, **status)
    page = Page(report(tmp_path)[0].read_text("utf-8"))
    assert page.row("Models", data.SMALL, "mesp")[2] == "failed: the disk is full"
    for heading in ("Memory over one step", "Gradient quality of MeZO", "Convergence"):
        assert page.tables[heading][0][1][-1] == "failed: the disk is full"
    stored = page.row("Store h against recompute h", data.SMALL, "256", "8", table=1)
    assert stored[-2] == "failed: the disk is full"


def test_odd_texts_are_shown_as_they_are(tmp_path: Path) -> None:
    odd = "<script>alert(1)</script> | *a* $x_1$ [b](c) `d"
    settings = data.step_settings(data.SMALL, "mesp") | {"shape": None, "model": "a $x_1$ <b>"}
    result = data.step_result(settings, 10.0, (1.0, 2.0, 0.5))
    data.write(tmp_path, "one", "models", "step", settings, result=result)
    data.write(tmp_path, "two", "models", "step", settings, status="failed", error=odd)
    html, markdown = report(tmp_path)
    page = Page(html.read_text("utf-8"))
    assert "script" not in page.tags
    assert page.row("Failed and skipped cases", "two")[3] == odd
    escaped = "&lt;script>alert(1)&lt;/script> \\| \\*a\\* $x_1$ \\[b\\](c) \\`d"
    assert escaped in markdown.read_text("utf-8")


def test_a_diverged_loss_is_a_gap(tmp_path: Path) -> None:
    curve = [{"step": s, "loss": 3.0 if s < 3 else None, "wall_s": s} for s in range(1, 31)]
    result = {"method": "mezo", "data": "d", "curve": curve, "valid": []}
    data.write(tmp_path, "c", "convergence", "convergence", {"method": "mezo"}, result=result)
    page = Page(report(tmp_path)[0].read_text("utf-8"))
    row = page.row("Convergence", "mezo")
    assert row[4:6] == ["3.000", "not finite"]


def test_the_papers_figures_are_of_its_own_cases_only(tmp_path: Path) -> None:
    for name, change in (("a", {}), ("b", {"batch_size": 2}), ("c", {"seq_len": 300})):
        settings = data.step_settings(data.MIDDLE, "mesp") | change
        data.write(tmp_path, name, "models", "step", settings, status="failed", error="e")
    found = [paper_figure(case) for case in read_results(tmp_path).cases]
    assert (found[0].megabytes, found[0].wall_s) == (262.6, 2.17)
    assert found[1:] == [None, None]


def test_directories_that_hold_no_results(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere does not exist; expected a directory"):
        report(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file is a file; expected a directory"):
        report(tmp_path / "file")
    with pytest.raises(InputError, match=r"holds no results: no file matches cases/\*\.json"):
        report(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_every_bad_file_is_named_with_what_is_wrong(tmp_path: Path) -> None:
    settings = data.step_settings(data.SMALL, "mesp")
    good = data.step_result(settings, 10.0, (1.0, 2.0, 0.5))
    data.write(tmp_path, "good", "models", "step", settings, result=good)
    data.write(tmp_path, "newer", "models", "step", settings, format="lowtide-bench/2")
    data.write(tmp_path, "group", "tables", "step", settings, result=good)
    data.write(tmp_path, "figure", "models", "step", settings, result={**good, "wall_s": "1"})
    data.write(tmp_path, "rank", "models", "step", settings | {"lora_r": "x"}, result=good)
    broken = data.write(tmp_path, "broken", "models", "step", settings)
    broken.write_text('{"format": ', encoding="utf-8")
    binary = data.write(tmp_path, "binary", "models", "step", settings)
    binary.write_bytes(b"\xff\xfe{")
    with pytest.raises(InputError) as raised:
        report(tmp_path)
    assert raised.value.exit_code == 2
    said = str(raised.value)
    for text in (
        r"newer\.json has format 'lowtide-bench/2'; this version of lowtide reads 'lowtide-bench/1",
        r"group\.json: group is 'tables'; expected one of models, ",
        r'figure\.json: result\.wall_s is "1"; expected a number',
        r"rank\.json: its settings cannot be used",
        r"broken\.json cannot be read",
        r"binary\.json cannot be read",
    ):
        assert re.search(text, said), said
    assert "good.json" not in said
    assert not (tmp_path / "report.html").exists()


def test_a_timeline_with_a_broken_sample_is_refused(tmp_path: Path) -> None:
    data.add_timelines(tmp_path)
    path = tmp_path / "cases" / "timeline-mesp.json"
    document = json.loads(path.read_text())
    del document["result"]["samples"][7]["bytes"]
    document["result"]["peak"]["where"] = None
    path.write_text(json.dumps(document))
    with pytest.raises(
        InputError, match=r"result\.samples\[7\]\.bytes is missing; expected an obj"
    ):
        report(tmp_path)


def test_without_matplotlib_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data.add_quality(tmp_path)
    # The drawing process as it would be where matplotlib is not installed.
    without = tmp_path / "plots.py"
    text = Path(report_module.__file__).with_name("plots.py").read_text("utf-8")
    without.write_text(text.replace("import json\n", "import json\nimport sys\n", 1).replace(
        "Chart = dict", "sys.modules['matplotlib'] = None\nChart = dict", 1
    ))  # fmt: skip
    monkeypatch.setattr(report_module, "_DRAWING", without)
    with pytest.raises(InputError, match=r'Run: pip install "lowtide\[bench\]"') as raised:
        report(tmp_path)
    assert raised.value.exit_code == 2
    assert not (tmp_path / "report.html").exists()


def test_a_drawing_process_that_dies_gives_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data.add_quality(tmp_path)
    dying = tmp_path / "dying.py"
    dying.write_text("raise SystemExit('out of ink')")
    monkeypatch.setattr(report_module, "_DRAWING", dying)
    with pytest.raises(LowtideError, match=r"ended with code 1\. Its last words:\n  out of ink"):
        report(tmp_path)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    data.add_quality(tmp_path)
    (tmp_path / "plots").write_text("a file where the directory should be")
    with pytest.raises(OutputError, match=r"plots cannot be made: File exists"):
        report(tmp_path)


def test_a_report_made_again_is_the_same(tmp_path: Path) -> None:
    data.add_quality(tmp_path)
    first = [path.read_bytes() for path in report(tmp_path)]
    assert [path.read_bytes() for path in report(tmp_path)] == first


def test_lowtide_does_not_hold_matplotlib(tmp_path: Path) -> None:
    data.add_quality(tmp_path)
    code = (
        "import sys; from pathlib import Path; from lowtide.bench.report import report; "
        "report(Path(sys.argv[1])); assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_plots_run_as_a_module(tmp_path: Path) -> None:
    chart = {"kind": "lines", "title": "t", "series": [{"name": "a", "color": "#000", "x": [1, 2]}]}
    chart["series"][0]["y"] = [1.0, None]
    request = {"out": str(tmp_path), "plots": [{"name": "one", "chart": chart}]}
    done = subprocess.run(
        [sys.executable, "-m", "lowtide.bench.plots"],
        input=json.dumps(request).encode(),
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0
    assert "</svg>" in (tmp_path / "one.svg").read_text("utf-8")


def test_differing_environments_are_shown_side_by_side(tmp_path: Path) -> None:
    data.add_quality(tmp_path)
    shutil.copy(tmp_path / "cases" / "quality.json", tmp_path / "cases" / "second.json")
    path = tmp_path / "cases" / "second.json"
    document = json.loads(path.read_text())
    document["environment"] |= {"torch": "9.9.9", "git_revision": None}
    path.write_text(json.dumps(document | {"name": "second"}))
    page = Page(report(tmp_path)[0].read_text("utf-8"))
    assert page.row("Machine and versions", "torch") == ["torch", "2.13.0", "9.9.9"]
    assert page.row("Machine and versions", "git revision")[2] == "not recorded"
    assert "These results come from 2 environments" in page.text
