"""The examples run as they stand, on the bundled model and the demo's data."""

from __future__ import annotations

import ast
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import small

import lowtide as lt
from lowtide.demo.assets import asset_dir
from lowtide.demo.household import write_data
from lowtide.notebook import table

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data")) / "train.jsonl"


def test_plan_then_train(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "adapter"
    with small.one_thread():
        runpy.run_path(str(EXAMPLES / "plan_then_train.py"))["main"](
            str(asset_dir()), str(data), str(out)
        )
    told = capsys.readouterr().out
    done = small.run(
        "generate", "--model", asset_dir(), "--adapter-path", out, "--prompt", "it is story time",
        "--max-tokens", 40, "--json",
    )  # fmt: skip
    assert f"after:  {done.document['text']}" in told


def test_two_adapters(data: Path, tmp_path: Path) -> None:
    with small.one_thread():
        losses = runpy.run_path(str(EXAMPLES / "two_adapters.py"))["main"](
            str(asset_dir()), str(data), str(tmp_path)
        )
    assert list(losses) == ["base", "rank 2", "rank 16"]
    assert losses["rank 16"] < losses["base"]
    for name, flags in (("base", []), ("rank 2", ["--adapter-path", tmp_path / "rank-2"])):
        done = small.run(
            "eval", "--model", asset_dir(), "--data", data, "--max-seq-length", 64,
            "--mask-prompt", "--json", *flags,
        )  # fmt: skip
        assert done.document["loss"] == losses[name]


def test_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells in order, and the last expression of each as a notebook shows it."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {}
    shown = []
    with small.one_thread():
        for cell in cells:
            if cell["cell_type"] != "code":
                continue
            assert not cell["outputs"]
            body = ast.parse("".join(cell["source"]))
            last = body.body.pop() if isinstance(body.body[-1], ast.Expr) else None
            exec(compile(body, "notebook", "exec"), names)
            if isinstance(last, ast.Expr):
                value = eval(compile(ast.Expression(last.value), "notebook", "eval"), names)
                shown.append(value._repr_html_())
    titles = ["a step's peak", "a run", "an evaluation", "a LoRA adapter"]
    assert [one.partition("</caption>")[0].partition("<caption>")[2] for one in shown] == [
        title.replace("'", "&#x27;") for title in titles
    ]
    assert f"{names['adapter'].config.r}</td>" in shown[3]


def test_what_a_table_holds_is_shown_as_text() -> None:
    told = table("<b>", [("<i>", "&")])
    assert "<b>" not in told
    assert "<i>" not in told
    assert "&amp;" in told


def test_ask_is_what_generate_says() -> None:
    done = small.run("generate", "--model", asset_dir(), "--prompt", "Dim it", "--json")
    assert lt.ask(lt.load_model(asset_dir()), None, "Dim it") == done.document["text"]
