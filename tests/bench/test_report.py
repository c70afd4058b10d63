"""The report's content: figures, ratios, plots, and what it says of cases that failed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import report_data as data
from report_pages import MINUS, Page, markdown_row

from lowtide.bench.report import report
from lowtide.bench.report_charts import colour, model_chart, nice_ticks, timeline_chart
from lowtide.bench.report_data import read_results
from lowtide.bench.report_text import command_line


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, str, Path]:
    """The report of the full fixture: the parsed page, the Markdown text, the directory."""
    directory = data.full(tmp_path_factory.mktemp("results"))
    html, markdown = report(directory)
    assert (html.name, markdown.name) == ("report.html", "report.md")
    return Page(html.read_text("utf-8")), markdown.read_text("utf-8"), directory


def test_the_table_of_models_holds_the_figures_beside_the_papers(
    made: tuple[Page, str, Path],
) -> None:
    page, markdown, _ = made
    expected = [data.SMALL, "mesp", "54.3", "1,264.8", "6.72", "13.31", "0.82"]
    # 54.3 / 871.2 and 6.72 / 9.41; the paper's 136.2 / 360.8 and 0.86 / 0.68.
    expected += [f"{MINUS}93.8%", f"{MINUS}28.6%", "136.2", "0.86", f"{MINUS}62.3%", "+26.5%"]
    assert page.row("Models", data.SMALL, "mesp") == expected
    assert markdown_row(markdown, "Models", data.SMALL, "mesp") == expected
    base = page.row("Models", data.SMALL, "mebp full")
    assert base[7:] == ["baseline", "baseline", "360.8", "0.68", "baseline", "baseline"]


def test_a_failed_case_says_why_in_its_row_and_in_the_list(made: tuple[Page, str, Path]) -> None:
    page, markdown, _ = made
    first = data.OUT_OF_MEMORY.splitlines()[0]
    row = page.row("Models", data.LARGE, "mebp full")
    assert row[2] == f"failed: {first}"
    assert row[3:] == ["637.6", "3.21", "baseline", "baseline"], "the paper's figures stay"
    cells = markdown_row(markdown, "Models", data.LARGE, "mebp full")
    assert cells[2].startswith("failed: needs 9,100,000,000 bytes")
    assert cells[3:9] == ["failed"] * 6
    assert len(cells) == len(markdown_row(markdown, "Models", data.LARGE, "mesp"))
    assert page.row("Models", data.LARGE, "mesp")[7:9] == ["no baseline", "no baseline"]
    failures = page.tables["Failed and skipped cases"][0]
    assert [row[2] for row in failures[1:]] == ["failed", "skipped", "failed"]
    assert failures[1][3] == data.OUT_OF_MEMORY, "in full, and not as markup"
    skipped = page.row("Peers", data.SMALL, "256", "mlx-lm, checkpointing")
    assert skipped[3] == 'skipped: mlx-lm is not installed; pip install "mlx-lm"'


def test_no_cell_is_blank(made: tuple[Page, str, Path]) -> None:
    page, markdown, _ = made
    for heading, tables in page.tables.items():
        for table in tables:
            assert all(cell.strip() for row in table[1:] for cell in row), heading
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert not [row for row in rows if re.search(r"\|\s*\|", row) and "case" not in row]


def test_the_summary_is_computed(made: tuple[Page, str, Path]) -> None:
    page, markdown, _ = made
    for text in (page.text, markdown):
        # 54.3 / 871.2, 6.72 / 9.41, 13.31 / 18.2; 54.3 / 97.6, 6.72 / 7.58, 13.31 / 15.02
        assert (
            "qwen2.5-0.5b, T = 256: mesp peaks at 54.3 MB, 0.06 of the memory of mebp with full "
            "logits (871.2 MB) and 0.71 of its wall time (0.73 of its CPU time); and 0.56 of the "
            "memory of mebp with the one-sweep loss (97.6 MB) and 0.89 of its wall time (0.89 of "
            "its CPU time)." in text
        )
        assert "mezo peaks at 48.9 MB, 0.90 of mesp, in 0.61 of its wall time." in text
        assert "The paper's MeSP needs 0.38 of the memory of its MeBP and 1.26 of its time" in text
        assert "3 of 48 cases failed or were skipped" in text


@pytest.mark.parametrize(
    ("heading", "key", "paper"),
    [
        ("Sequence length", "128", "110.7"),
        ("Sequence length", "1024", "513.6"),
        ("Rank", "4", "132.8"),
        ("Rank", "32", "158.2"),
    ],
)
def test_the_sweeps_hold_the_papers_figures(
    made: tuple[Page, str, Path], heading: str, key: str, paper: str
) -> None:
    page, markdown, _ = made
    row = page.row(heading, key, "mesp")
    assert row[9] == paper
    assert row == markdown_row(markdown, heading, key, "mesp")


def test_a_sweep_takes_the_point_that_was_measured_among_the_models(
    made: tuple[Page, str, Path],
) -> None:
    page, _, directory = made
    assert page.row("Sequence length", "256", "mesp")[2] == "54.3"
    assert page.row("Rank", "8", "mebp sweep")[2] == "97.6"
    assert [c for c in read_results(directory).group("sequence") if c.seq_len == 256] == []


def test_the_bytes_of_h_stand_beside_the_measured_difference(
    made: tuple[Page, str, Path],
) -> None:
    page, markdown, directory = made
    row = page.row("Store h against recompute h", data.LARGE, "256", "8", table=1)
    # 7 x 36 x 256 x 8 x 4 = 2,064,384 bytes of h; 2,105,344 measured; 398.5 - 368.4.
    assert row[3:6] == ["7 x 36 x 256 x 8 x 4", "2.06", "+2.11"]
    assert row[7] == "+30.1"
    for text in (page.text, markdown):
        assert "the paper's 30 MB difference is not h alone" in text
    cases = {case.name: case for case in read_results(directory).cases}
    assert cases["store-h-3b"].h_bytes() == (data.H_3B_BYTES, "7 x 36 x 256 x 8 x 4")
    small = cases[f"models-{data.SMALL}-mesp-t256-r8"]
    assert small.h_bytes() == (7 * 24 * 256 * 8 * 4, "7 x 24 x 256 x 8 x 4")


def test_the_bytes_of_h_follow_targets_batch_dtype_and_a_models_own_config(tmp_path: Path) -> None:
    model = tmp_path / "own-model"
    model.mkdir()
    (model / "config.json").write_text('{"num_hidden_layers": 5}', encoding="utf-8")
    settings = data.step_settings(data.SMALL, "mesp") | {
        "shape": None,
        "model": str(model),
        "target_modules": "q_proj,v_proj",
        "batch_size": 3,
        "compute_dtype": "bfloat16",
    }
    result = data.step_result(settings, 10.0, (1.0, 2.0, 0.5))
    data.write(tmp_path, "own", "models", "step", settings, result=result)
    data.write(tmp_path, "gone", "models", "step", settings | {"model": "/no/such"}, result=result)
    gone, own = read_results(tmp_path).cases
    assert own.h_bytes() == (2 * 5 * 3 * 256 * 8 * 2, "2 x 5 x 768 x 8 x 2")
    assert gone.h_bytes() is None
    assert own.model == "own-model"


def test_timelines_name_their_peak(made: tuple[Page, str, Path]) -> None:
    page, markdown, directory = made
    heading = "Memory over one step"
    case = next(c for c in read_results(directory).cases if c.name == "timeline-mesp")
    peak = case.result["peak"]
    rows = page.tables[heading][0]
    column = rows[0].index("mesp")
    shown = {row[0]: row[column] for row in rows[1:]}
    assert shown["RssAnon"] == f"{peak['rss_anon_bytes'] / 1e6:.2f}"
    assert shown["block inputs"] == f"{peak['bytes']['block inputs'] / 1e6:.2f}"
    assert shown["sum / RssAnon"] == f"{peak['sum_bytes'] / peak['rss_anon_bytes']:.1%}"
    assert page.row(heading, data.SMALL, "mezo", table=1)[2] == "failed: interrupted"
    assert "backward of block 23: glu_backward" in markdown


def test_a_timeline_is_thinned_without_losing_its_peak(made: tuple[Page, str, Path]) -> None:
    case = next(c for c in read_results(made[2]).cases if c.name == "timeline-mesp")
    chart = timeline_chart(case, points=100)
    assert len(chart["x"]) == 100
    assert max(chart["line"]["y"]) == case.result["peak"]["rss_anon_bytes"] / 1e6
    assert "optimizer" not in [one["name"] for one in chart["series"]], "a kind that is always 0"


def test_quality_convergence_and_peers(made: tuple[Page, str, Path]) -> None:
    page, markdown, _ = made
    # sqrt(64 / (4,399,104 + 65)) = 0.003814; the fixture's cosine is 0.9 of it.
    expected = ["64", "0.003433", "0.003814", "0.90"]
    assert page.row("Gradient quality of MeZO", "64") == expected
    assert markdown_row(markdown, "Gradient quality of MeZO", "64") == expected
    layers = page.tables["Gradient quality of MeZO"][1]
    assert [row[0] for row in layers[1:]] == [str(layer) for layer in range(24)]
    convergence = page.row("Convergence", "mebp sweep")
    assert convergence[2:4] == ["200", "7.2"]
    assert convergence[-2:] == ["3.400", "2.067"]
    peer = page.row("Peers", data.SMALL, "256", "trl+peft, checkpointing")
    # 54.3 / 927.4
    assert peer[3:] == ["927.4", "2,903.4", "9.90", "20.20", f"{MINUS}94.1%"]


def test_the_page_loads_nothing_and_runs_nothing(made: tuple[Page, str, Path]) -> None:
    page, _, directory = made
    html = (directory / "report.html").read_text("utf-8")
    assert page.loads, "the plots"
    assert all(one.startswith("data:image/svg+xml;base64,") for one in page.loads)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    style = html.split("<style>")[1].split("</style>")[0]
    assert "@import" not in style
    assert "url(" not in style
    assert all(page.images), "every plot has words for who cannot see it"


def test_markdown_links_the_plots_that_were_written(made: tuple[Page, str, Path]) -> None:
    page, markdown, directory = made
    links = re.findall(r"!\[[^]]*\]\(([^)]+)\)", markdown)
    assert len(links) == len(page.images) == 14
    for link in links:
        svg = (directory / link).read_text("utf-8")
        assert svg.startswith("<?xml")
        assert "</svg>" in svg
    assert {Path(link).name for link in links} == {p.name for p in (directory / "plots").iterdir()}


def test_markdown_tables_have_one_width(made: tuple[Page, str, Path]) -> None:
    table: list[int] = []
    for line in [*made[1].splitlines(), ""]:
        if line.startswith("|"):
            table.append(len(re.split(r"(?<!\\)\|", line)))
            continue
        assert len(set(table)) <= 1, table
        table = []


def test_a_method_has_one_colour_in_every_chart(made: tuple[Page, str, Path]) -> None:
    results = read_results(made[2])
    chart = model_chart(results.group("models"), "peak_anon_bytes", "", "")
    colours = {one["name"]: one["color"] for one in chart["series"]}
    assert colours["mesp"] == colours["mesp, paper"] == colour("mesp")
    own = {one["name"]: one["color"] for one in chart["series"] if "paper" not in one["name"]}
    assert len(set(own.values())) == len(own) == 4


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [([54.3, 3342.8], 43, 4179), ([4.1, 9.4], 3.3, 11.8), ([0.00028, 0.0038], 0.0002, 0.005)],
)
def test_ticks_are_few_and_within_the_axis(values: list[float], low: float, high: float) -> None:
    ticks = nice_ticks(values)
    assert 3 <= len(ticks) <= 8
    assert low <= ticks[0] < ticks[-1] <= high


def test_commands_measure_a_case_again(made: tuple[Page, str, Path]) -> None:
    page, _, directory = made
    cases = {case.name: case for case in read_results(directory).cases}
    line = command_line(cases["store-h-3b"])
    assert line.startswith("lowtide bench step --model=qwen2.5-3b --seq-len=256 ")
    assert line.endswith("--method=mesp --no-recompute-h")
    assert page.row("How each figure was made", "store-h-3b")[1] == line
    line = command_line(cases["convergence-mesp"])
    assert line == "lowtide bench paper --only=convergence --out=DIR"
    line = command_line(cases["peer-mlx-lm"])
    assert line == "lowtide bench peers --model=qwen2.5-0.5b --seq-len=256 --out=DIR"
    assert len(page.tables["How each figure was made"][0]) == 1 + len(cases)


def test_what_is_measured_differently_is_said(made: tuple[Page, str, Path]) -> None:
    for text in (made[0].text, made[1].replace("\\_", "_")):
        for words in ("phys_footprint every 0.5 s", "4-bit", "bfloat16", "phone", "SGD"):
            assert words in text
