"""Keys of rank_pattern: matched as PEFT matches them, in bounded time whatever they are."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import small

import lowtide as lt
from lowtide.errors import AdapterError, ConfigError
from lowtide.model import patterns

PATHS = [
    f"model.layers.{layer}.{linear}"
    for layer in range(12)
    for linear in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
]
ENDLESS = "((.|.)*)+[A-Z]"


def pefts(keys: tuple[str, ...], path: str) -> str | None:
    """`peft.utils.other.get_pattern_key`, which returns the path where nothing matches."""
    from peft.utils.other import get_pattern_key

    found: str = get_pattern_key(keys, path)
    return found if found in keys else None


@pytest.mark.parametrize(
    "keys",
    [
        ("q_proj",),
        ("proj", "attn.q_proj", "self.attn.q_proj"),  # a dot is any character, as in PEFT
        (r"layers\.[0-3]\..*", "q_proj", "down_proj"),
        (r"layers\.1\.", r".*\.1\..*", r"(?i:MLP)\.(gate|down)_proj"),
        ("down_proj", r"(?<=mlp\.)down_proj", ".*"),
        (".*1.*gate_proj|q_proj", "mlp.gate_proj"),
        ("q_proj{e<=1}", "[[a]*", "gate_proj"),
    ],
)
def test_keys_are_pefts(keys: tuple[str, ...]) -> None:
    patterns.match_all(keys, PATHS)
    for path in PATHS:
        assert patterns.first_match(keys, path) == pefts(keys, path), path


def test_names_alone_need_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "subprocess", None)
    keys = tuple(path.removeprefix("model.") for path in PATHS)
    assert [patterns.first_match(keys, path) for path in PATHS] == list(keys)


def test_an_expression_that_does_not_end_is_refused_by_name(
    model: Path, data: Path, tmp_path: Path
) -> None:
    before = os.times()
    with pytest.raises(ConfigError, match=re.escape(repr(ENDLESS)) + " takes too long"):
        patterns.match_all(("q_proj", r"layers\.0\..*", ENDLESS, "last|"), PATHS)
    after = os.times()
    assert after.children_user - before.children_user < 1.5  # seconds of CPU, not of a clock
    outcome = small.run(
        "train", "--model", model, "--data", data, "--adapter-path", tmp_path / "out",
        "--rank-pattern", f"{ENDLESS}=4", "--max-seq-length", 32,
    )  # fmt: skip
    assert outcome.code == 2
    assert "takes too long" in outcome.err
    assert "Name the modules" in outcome.err
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_a_stranger_is_refused(model: Path, tmp_path: Path) -> None:
    decoder = lt.load_model(model)
    lt.Adapter.create(decoder, lt.LoraConfig(r=2), 0).save(tmp_path / "theirs")
    config = tmp_path / "theirs" / "adapter_config.json"
    usual = json.loads(config.read_text())
    for pattern, told in (
        ({ENDLESS: 2}, "takes too long"),
        ({"q" * 501: 2}, "501 characters, more than 500"),
        ({"(": 2}, "missing"),
    ):
        config.write_text(json.dumps({**usual, "rank_pattern": pattern}))
        with pytest.raises(AdapterError, match=told):
            lt.Adapter.load(tmp_path / "theirs", decoder)
