"""The household's data: split without overlap, private throughout, written as JSONL."""

from __future__ import annotations

import json
from pathlib import Path

from lowtide.demo.household import (
    TEST,
    TRAIN,
    VALID,
    household,
    is_private,
    write_data,
)
from lowtide.demo.requests import KEYS, TOOLS, generic_examples


def test_parts_have_their_sizes_and_share_no_request() -> None:
    split = household()
    assert [len(part) for part in split] == [TRAIN, VALID, TEST]
    cores = [drawn.core for part in split for drawn in part]
    assert len(set(cores)) == len(cores)
    prompts = [{drawn.prompt for drawn in part} for part in split]
    assert not prompts[0] & prompts[2]
    assert not prompts[0] & prompts[1]


def test_the_same_seed_gives_the_same_household() -> None:
    assert household(1) == household(1)
    assert household(1) != household(2)


def test_every_request_needs_a_private_fact_and_a_known_tool() -> None:
    for part in household():
        for drawn in part:
            assert is_private(drawn)
            call = json.loads(drawn.completion)
            assert call["tool"] in TOOLS
            assert list(call) == [key for key in KEYS if key in call]
    assert not any(is_private(drawn) for drawn in generic_examples(1, 1000))


def test_data_directory(tmp_path: Path) -> None:
    written = write_data(tmp_path / "data")
    split = household()
    for name, part in split._asdict().items():
        lines = (written / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        assert records == [{"prompt": d.prompt, "completion": d.completion} for d in part]
