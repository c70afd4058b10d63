"""Every family against transformers and PEFT. A new one is tested without an edit here."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import made_up
import pytest
import torch
from made_up import ALL

import lowtide as lt
from lowtide.check.conformance import (
    GREEDY,
    LENGTHS,
    Errors,
    Example,
    labels_of,
    random_adapter,
    random_ids,
    relative,
)
from lowtide.check.planned import planned_and_measured
from lowtide.errors import ModelError
from lowtide.methods import MethodOptions, Step, get_method
from lowtide.methods.buffers import Buffers
from lowtide.methods.structured import structured_losses, structured_step
from lowtide.model.families import FAMILIES, spec_from_config

Measured = Callable[[Example], Errors]
# transformers keeps norms, angles and softmax in float32 even in a float64 model: about 1e-7 each.
TRANSFORMERS = 1e-5
# Formulas that are in float64 on both sides leave its rounding: 1e-14 in these few blocks.
EXACT = 1e-9
# The noise-floor rule: no further from the truth than twice what the plain way is.
NOISE = 2.0


def test_logits_are_transformers(example: Example, measured: Measured) -> None:
    errors = measured(example)
    assert errors.logits <= TRANSFORMERS
    assert errors.logits_float32 <= NOISE


def test_gradients_are_those_of_transformers_and_peft(example: Example, measured: Measured) -> None:
    errors = measured(example)
    assert errors.gradients <= TRANSFORMERS
    assert errors.gradients_float32 <= NOISE
    assert errors.autograd <= EXACT


def test_generation_with_a_cache(example: Example, measured: Measured) -> None:
    errors = measured(example)
    assert errors.cache <= EXACT
    assert errors.greedy == GREEDY


def test_adapters_go_to_peft_and_come_back(example: Example, measured: Measured) -> None:
    errors = measured(example)
    assert errors.to_peft <= TRANSFORMERS
    assert errors.from_peft <= TRANSFORMERS


WAYS = {
    "stored h": ("mesp", {"recompute_h": False}),
    "one block kept": ("mesp", {"keep_blocks": 1}),
    "all kept, h too": ("mesp", {"keep_blocks": 2, "recompute_h": False}),
    "small tiles": ("mesp", {"tiles": "quarter"}),
    "mebp": ("mebp", {}),
}


def test_every_exact_way_gives_autograds_gradients(example: Example) -> None:
    """With dropout, so that each recompute, also of a fused projection, must find its mask."""
    model = example.load()
    plain = random_adapter(model)
    config = lt.LoraConfig(r=3, lora_alpha=16, lora_dropout=0.2)
    adapter = lt.Adapter(config, plain.parameters)
    ids = random_ids(model.spec.vocab_size, LENGTHS)
    batch = lt.Batch.from_sequences(ids, labels_of(ids))
    truth = lt.gradients(model, adapter, batch, "autograd", dropout_seed=7).grads
    for way, (name, options) in WAYS.items():
        method = get_method(name, MethodOptions(**options))
        ours = lt.gradients(model, adapter, batch, method, dropout_seed=7).grads
        assert max(relative(ours[n], grad) for n, grad in truth.items()) <= EXACT, way


def test_a_batch_is_its_sequences_one_by_one(example: Example) -> None:
    model = example.load()
    adapter = random_adapter(model)
    rows = random_ids(model.spec.vocab_size, LENGTHS)

    def losses(ids: list[list[int]]) -> torch.Tensor:
        return structured_losses(model, adapter, lt.Batch.from_sequences(ids), Buffers())

    assert relative(losses(rows), torch.cat([losses([row]) for row in rows])) <= EXACT


class _Drop:
    def add(self, name: str, grad: torch.Tensor) -> None:
        """Forget it."""


def test_the_buffers_that_are_planned_are_those_that_a_step_touches(example: Example) -> None:
    """To the element: filled with a mark before a step, what is planned as untouched still has it.

    Logits and activations, whose room this model does not fill, are left out unless nothing touched
    them. One position of the 40 has no label, so that a row of two buffers may stay as it was.
    """
    model, tokens = example.load(torch.float32), 40
    spec = model.spec
    batch = lt.Batch.from_sequences(random_ids(spec.vocab_size, [tokens]))
    adapter, mark = random_adapter(model), 1.2345e30
    rows = max((tokens - 1) * spec.hidden_size, tokens * spec.q_width)
    unlabelled = 2 * max(0, tokens * spec.hidden_size - rows)
    for backward in (True, False):
        buffers = Buffers()
        buffers.reserve(model, tokens, tokens, spec.num_layers + 1)
        ws = buffers._ws
        assert ws is not None
        whole = [*ws._wide, *ws._narrow, ws._raw, ws.tile]
        for part in (*whole, *ws.scores, *ws.glu.activations[2:]):
            part.fill_(mark)
        if backward:
            structured_step(
                model, adapter, batch, _Drop(), Step(1.0),
                buffers=buffers, layers=range(spec.num_layers),
            )  # fmt: skip
        else:
            structured_losses(model, adapter, batch, buffers)
        unwritten = sum(int((part == mark).sum()) for part in whole)
        perhaps = (*ws.scores, *ws.glu.activations[2:])
        idle = [part for part in perhaps if bool((part == mark).all())]
        planned = ws.untouched_bytes(backward=backward, widened=False, recomputes=True)
        assert unwritten + sum(part.numel() for part in idle) == planned // 4 + unlabelled


@pytest.mark.slow
def test_the_prediction_is_near_what_is_measured(family: str) -> None:
    predicted, measured = planned_and_measured(ALL[family].examples[0], made_up.command)
    assert abs(predicted - measured) <= max(0.05 * measured, 4e6)


def _with(config: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """The config with other fields, in its text model where it has one inside."""
    if "text_config" in config:
        return {**config, "text_config": {**config["text_config"], **fields}}
    return {**config, **fields}


def test_a_field_that_nobody_knows_is_refused_by_name(family: str) -> None:
    for config in ALL[family].examples:
        spec_from_config(config)
        with pytest.raises(
            ModelError, match=r"novel_gate = 0\.5 is not a field that lowtide knows"
        ):
            spec_from_config(_with(config, novel_gate=0.5))
        with pytest.raises(ModelError, match=r"hidden_size = 'wide' \(expected a positive number"):
            spec_from_config(_with(config, hidden_size="wide"))
        with pytest.raises(ModelError, match=r"hidden_act = 'relu'|hidden_activation = 'relu'"):
            spec_from_config(_with(config, hidden_act="relu", hidden_activation="relu"))


_ODD = (None, True, "many", -1, 0, 2.5, 1e30, [], ["a"], [{"a": 1}], {}, {"a": "b"}, float("nan"))


def test_odd_values_are_read_or_refused(family: str) -> None:
    """Every field of every example, with every odd value: a spec or a `ModelError`."""
    for config in ALL[family].examples:
        inner = config.get("text_config", config)
        ropes = {"rope_parameters": None, "rope_scaling": None}
        for name in {**inner, **ropes, "sliding_window": 0, "max_window_layers": 0}:
            for value in _ODD:
                with contextlib.suppress(ModelError):
                    spec_from_config(_with(config, **{name: value}))
        for field in ("rope_type", "factor", "rope_theta", "short_factor", "full_attention"):
            for value in _ODD:
                with contextlib.suppress(ModelError):
                    spec_from_config(_with(config, rope_scaling={field: value}))


def test_what_transformers_writes_reads_as_the_same_model(example: Example) -> None:
    spec = spec_from_config(example.config)
    written = json.loads(example.hf_config().to_json_string(use_diff=False))
    written.pop("vision_config", None)
    again = spec_from_config({**written, "model_type": written["model_type"]})
    assert {**vars(again), "model_type": ""} == {**vars(spec), "model_type": ""}


def test_a_missing_field_means_what_it_means_to_transformers(family: str) -> None:
    """Each field of each example left out: the spec is that of what transformers fills in."""
    compared = 0
    for config in ALL[family].examples:
        for name in {*config.get("text_config", config)} - {"model_type"}:
            left = json.loads(json.dumps(config))
            left.get("text_config", left).pop(name)
            with contextlib.suppress(ModelError):
                spec = spec_from_config(left)
                filled = Example(Path(), left).hf_config()
                written = json.loads(filled.to_json_string(use_diff=False))
                written.pop("vision_config", None)
                again = spec_from_config(written)
                assert {**vars(again), "model_type": ""} == {**vars(spec), "model_type": ""}, name
                compared += 1
    assert compared >= 4


def test_every_family_has_examples_longer_than_their_windows(family: str) -> None:
    assert ALL[family].examples
    for config in ALL[family].examples:
        windows = [layer.window for layer in spec_from_config(config).layers if layer.window]
        assert all(window < max(LENGTHS) or window == 64 for window in windows)


def test_the_made_up_family_is_one_file_and_takes_part(request: pytest.FixtureRequest) -> None:
    """Every test here that runs on a family or a case runs on the made-up one."""
    assert made_up.NAME in FAMILIES
    source = Path(made_up.__file__).parents[2] / "src"
    assert not any(made_up.NAME in path.read_text() for path in source.rglob("*.py"))
    here = [item for item in request.session.items if item.path == request.path]
    over = {item.function.__name__ for item in here if hasattr(item, "callspec")}
    on_it = {item.function.__name__ for item in here if made_up.NAME in item.name}
    assert on_it == over


def test_outside_these_tests_it_is_not_there() -> None:
    code = "from lowtide.model.families import FAMILIES; print('wombat' in FAMILIES)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
