"""The request generator: seeded, well formed, and each answer has one right spelling."""

from __future__ import annotations

import json
from itertools import islice

import pytest

from lowtide.demo.requests import (
    KEYS,
    TEMPLATES,
    TOOLS,
    call_json,
    exact_match,
    generic_examples,
    stream,
)
from lowtide.demo.slots import GENERIC


def test_the_same_seed_gives_the_same_requests() -> None:
    first = generic_examples(3, 200)
    assert first == generic_examples(3, 200)
    assert first != generic_examples(4, 200)


def test_every_answer_is_compact_json_with_known_keys_in_order() -> None:
    for drawn in generic_examples(5, 2000):
        call = json.loads(drawn.completion)
        assert list(call) == [key for key in KEYS if key in call]
        assert call["tool"] in TOOLS
        assert drawn.completion == call_json(call)
        assert "{" not in drawn.prompt
        assert "[" not in drawn.prompt


def test_every_tool_and_slot_occurs() -> None:
    drawn = generic_examples(6, 3000)
    assert {json.loads(one.completion)["tool"] for one in drawn} == set(TOOLS)
    assert {key for one in drawn for key in json.loads(one.completion)} == set(KEYS)
    patterns = "".join(pattern for template in TEMPLATES for pattern in template.patterns)
    assert all(f"{{{name}}}" in patterns for name in GENERIC)


def test_most_rooms_are_names_seen_once() -> None:
    rooms = [json.loads(drawn.completion).get("room") for drawn in generic_examples(7, 3000)]
    named = [room for room in rooms if room]
    assert len(set(named)) > 0.4 * len(named)


def test_left_out_requests_never_come() -> None:
    held_out = generic_examples(8, 300)
    cores = {drawn.core for drawn in held_out}
    assert len(cores) == 300
    seen = islice(stream(8, exclude=cores), 3000)
    assert not cores & {drawn.core for drawn in seen}


@pytest.mark.parametrize(
    ("answer", "right"), [(' {"a":1}\n', True), ('{"a":1}', True), ('{"a": 1}', False), ("", False)]
)
def test_exact_match_ignores_only_space_around(answer: str, right: bool) -> None:
    assert exact_match(answer, '{"a":1}') is right
