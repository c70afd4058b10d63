"""No model's name in the code outside `model/families/`: what differs is data.

Docstrings and comments may name a model where a formula comes from it, messages may give a hub id
as an example, and llama.cpp is a program. Left out: the paper's cases and the peers' in `bench/`,
which are about named models, and the two programs that made the bundled model with transformers.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lowtide
from lowtide.model.families import FAMILIES

SOURCE = Path(lowtide.__file__).parent
LEFT_OUT = (
    "model/families/", "bench/paper.py", "bench/peers.py", "bench/report_paper.py",
    "demo/pretrain.py", "demo/build.py", "data/pre_tokenizers.py",
)  # fmt: skip
STEMS = sorted({re.sub(r"\d.*|_text", "", name) for name in FAMILIES} - {"phi"})
NAME = re.compile("|".join([*STEMS, "phi3", "phi-3", "smollm"]), re.IGNORECASE)
HUB_ID = re.compile(r"\b[A-Za-z][\w-]*/[\w.-]+|llama[.-](?:cpp|cli)|llama_cpp")


def _words(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Identifiers, and strings that are no docstrings."""
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.lineno, HUB_ID.sub("", node.value)
        for field in ("id", "attr", "name", "arg", "module"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield getattr(node, "lineno", 0), value


def _found(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [f"{path}:{line}: {word!r}" for line, word in _words(tree) if NAME.search(word)]


def test_no_name_of_a_model_in_the_code() -> None:
    assert len(STEMS) >= 7
    paths = [
        path
        for path in SOURCE.rglob("*.py")
        if not path.relative_to(SOURCE).as_posix().startswith(LEFT_OUT)
    ]
    assert len(paths) > 100
    assert [found for path in paths for found in _found(path)] == []


@pytest.mark.parametrize(
    "code",
    [
        'if spec.model_type == "qwen2": pass',
        "from x import LlamaNorm",
        "def gemma_norm(): pass",
        'KINDS = {"phi3": 1}',
    ],
)
def test_a_name_is_found(code: str, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(f'"""Qwen2 may be named here."""\n{code}\n')
    assert len(_found(tmp_path / "a.py")) == 1
