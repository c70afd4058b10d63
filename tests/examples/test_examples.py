"""The examples run as they stand, on the bundled model and the demo's data."""

from __future__ import annotations

import json
import subprocess
import sys
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


def python(*arguments: object, **where: Any) -> str:
    """What a program of its own prints: a memory budget counts the whole process."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300,
        check=False, env=small.environment(), **where,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_plan_then_train(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    told = python(EXAMPLES / "plan_then_train.py", asset_dir(), data, out)
    done = small.run(
        "generate", "--model", asset_dir(), "--adapter-path", out, "--prompt", "it is story time",
        "--max-tokens", 40, "--json",
    )  # fmt: skip
    assert f"after:  {done.document['text']}" in told


def test_two_adapters(data: Path, tmp_path: Path) -> None:
    told = python(EXAMPLES / "two_adapters.py", asset_dir(), data, tmp_path)
    losses = {line[:8].strip(): line[8:].strip() for line in told.splitlines()}
    assert list(losses) == ["base", "rank 2", "rank 16"]
    assert float(losses["rank 16"]) < float(losses["base"])
    for name, flags in (("base", []), ("rank 2", ["--adapter-path", tmp_path / "rank-2"])):
        done = small.run(
            "eval", "--model", asset_dir(), "--data", data, "--max-seq-length", 64,
            "--mask-prompt", "--json", *flags,
        )  # fmt: skip
        assert f"{done.document['loss']:.4f}" == losses[name]


NOTEBOOK = """
import ast, json, sys
names, shown = {}, []
for cell in json.load(open(sys.argv[1], encoding="utf-8"))["cells"]:
    if cell["cell_type"] != "code":
        continue
    assert not cell["outputs"]
    body = ast.parse("".join(cell["source"]))
    last = body.body.pop() if isinstance(body.body[-1], ast.Expr) else None
    exec(compile(body, "notebook", "exec"), names)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), "notebook", "eval"), names)
        shown.append(value._repr_html_())
print(json.dumps([shown, names["adapter"].config.r]))
"""


def test_the_notebook(tmp_path: Path) -> None:
    """Its cells in order, and the last expression of each as a notebook shows it."""
    told = python("-c", NOTEBOOK, EXAMPLES / "notebook.ipynb", cwd=tmp_path)
    shown, rank = json.loads(told.splitlines()[-1])
    titles = ["a step's peak", "a run", "an evaluation", "a LoRA adapter"]
    assert [one.partition("</caption>")[0].partition("<caption>")[2] for one in shown] == [
        title.replace("'", "&#x27;") for title in titles
    ]
    assert f"{rank}</td>" in shown[3]


def test_what_a_table_holds_is_shown_as_text() -> None:
    told = table("<b>", [("<i>", "&")])
    assert "<b>" not in told
    assert "<i>" not in told
    assert "&amp;" in told


def test_ask_is_what_generate_says() -> None:
    done = small.run("generate", "--model", asset_dir(), "--prompt", "Dim it", "--json")
    assert lt.ask(lt.load_model(asset_dir()), None, "Dim it") == done.document["text"]
