"""A limit on resident weights: kept in both directions of travel, and nothing else changes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_adapter, random_batch, write_model

import lowtide as lt
from lowtide.errors import ConfigError
from lowtide.methods import METHODS, get_method
from lowtide.model.decoder import Decoder
from lowtide.model.quantized import quantize_model
from lowtide.weights.residency import Residency

LAYERS = 6
# Blocks of 1.7 MB and a head of 4.1 MB in 16 bit: many pages each.
SHAPE = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "vocab_size": 8009,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 64,
}
# A page fault maps the cached pages of 64 KB around it (fault_around_bytes), so that each piece's
# neighbours may keep as much on either side until they are released themselves.
FAULT_AROUND = 2 * 64 * 1024


@pytest.fixture(scope="module", params=["tied", "untied", "int8"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {**SHAPE, "tie_word_embeddings": request.param == "tied"}
    model = write_model(tmp_path_factory.mktemp("model"), shape, torch.bfloat16)
    if request.param == "int8":
        quantize_model(str(model), model / "quantized", "int8")
        return model / "quantized"
    return model


def resident(directory: Path) -> int:
    """Bytes of the directory's files that are mapped and resident, by the kernel's word."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = str(directory) in line
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def limited(directory: Path, pieces: float) -> tuple[Decoder, Residency, int]:
    """The model with room for that many of its largest pieces."""
    smallest = residency_of(lt.load_model(directory, resident_weights="1GB")).smallest_limit
    limit = int(smallest * pieces / 2)
    model = lt.load_model(directory, resident_weights=limit)
    return model, residency_of(model), limit


def batch_for(model: Decoder, lengths: list[int]) -> lt.Batch:
    return lt.Batch.from_sequences(*random_batch(model.spec.vocab_size, lengths))


def residency_of(model: Decoder) -> Residency:
    assert model.residency is not None
    return model.residency


def test_without_a_limit_nothing_watches(directory: Path) -> None:
    model = lt.load_model(directory)
    assert model.residency is None
    assert model.head.watch is None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pieces", [2, 4.5])
def test_gradients_are_the_same_to_the_bit(directory: Path, method: str, pieces: float) -> None:
    free, (model, _, _) = lt.load_model(directory), limited(directory, pieces)
    batch = batch_for(free, [23, 9])
    results = []
    for one in (free, model):
        adapter = random_adapter(one, lt.LoraConfig(r=3))
        results.append([lt.gradients(one, adapter, batch, method, seed=3) for _ in range(2)])
    for expected, found in zip(*results, strict=True):
        assert found.loss == expected.loss
        assert all(torch.equal(found.grads[name], g) for name, g in expected.grads.items())


@pytest.mark.parametrize("method", ["mesp", "mebp", "mezo", "lcsb"])
@pytest.mark.parametrize("pieces", [2, 4.5])
def test_resident_pages_stay_within_the_limit_both_ways(
    directory: Path, method: str, pieces: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, residency, limit = limited(directory, pieces)
    places: list[int] = []
    sizes: list[int] = []
    use = Residency.use

    def watched(self: Residency, piece: int) -> None:
        moves = piece != self._at
        if moves:  # the piece before has been read whole
            sizes.append(resident(directory))
        use(self, piece)
        if moves:
            places.append(piece)
            sizes.append(resident(directory))

    monkeypatch.setattr(Residency, "use", watched)
    adapter, instance = random_adapter(model, lt.LoraConfig(r=3)), get_method(method)
    for _ in range(2):
        lt.gradients(model, adapter, batch_for(model, [23, 9]), instance)
    assert places[: LAYERS + 1] == [0, 1, 2, 3, 4, 5, 6]  # up, then the head
    if method in ("mesp", "mebp"):
        assert places[-LAYERS:] == [5, 4, 3, 2, 1, 0]
    assert max(sizes) <= limit + FAULT_AROUND * len(residency.pieces)
    assert max(sizes) >= min(residency.nbytes)  # the instrument sees pages at all


def test_without_a_limit_the_instrument_sees_everything(directory: Path) -> None:
    """So that the test above can fail."""
    model = lt.load_model(directory)
    lt.gradients(model, random_adapter(model, lt.LoraConfig(r=3)), batch_for(model, [23]))
    assert resident(directory) > 0.9 * model.checkpoint.nbytes / (1 if model.spec.tied_head else 2)


def test_generation_within_the_limit(directory: Path) -> None:
    free, (model, residency, limit) = lt.load_model(directory), limited(directory, 3)
    assert list(lt.generate(model, None, [5, 7], 6)) == list(lt.generate(free, None, [5, 7], 6))
    del free
    assert residency.resident_bytes <= limit


def test_a_limit_too_small_says_how_much_it_takes(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs at least [\d,]+: a block in use and the next"):
        lt.load_model(directory, resident_weights="100KB")


@pytest.mark.parametrize("text", ["", "many", "-5", "0", "5XB", True])
def test_what_is_no_size(directory: Path, text: Any) -> None:
    with pytest.raises(ConfigError, match="expected a size such as 400MB"):
        lt.load_model(directory, resident_weights=text)


def test_where_there_is_no_room_a_limit_is_chosen(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowtide.model.resident.available_bytes", lambda: 10_000_000)
    model = lt.load_model(directory)
    free = lt.load_model(directory, resident_weights="1GB")
    batch = batch_for(model, [23])
    found = lt.gradients(model, random_adapter(model, lt.LoraConfig(r=3)), batch)
    assert found.loss == lt.gradients(free, random_adapter(free, lt.LoraConfig(r=3)), batch).loss
    assert residency_of(model).resident_bytes <= residency_of(model).smallest_limit


class Pages:
    """Stands in for a span: counts what is read."""

    def __init__(self, log: list[int], number: int, nbytes: int) -> None:
        self.log, self.number, self.nbytes, self.there = log, number, nbytes, False

    def will_need(self) -> None:
        if not self.there:
            self.log.append(self.number)
        self.there = True

    def release(self, *, from_cache: bool) -> None:
        self.there = False

    def read_only_what_is_asked(self) -> None:
        pass


BLOCKS, PARTS, SIZE = 24, 9, 100


def passes(kind: str) -> Iterator[int]:
    up = range(BLOCKS + PARTS)
    yield from up
    if kind == "training":
        yield from reversed(range(BLOCKS))


@pytest.mark.parametrize("kind", ["training", "evaluation"])
@pytest.mark.parametrize("pinned", [0, 1, 5, 12])
def test_a_pass_reads_what_was_not_there_and_nothing_twice(kind: str, pinned: int) -> None:
    log: list[int] = []
    pages = [Pages(log, number, SIZE) for number in range(BLOCKS + PARTS)]
    limit: Callable[[], int] = lambda: (2 + pinned) * SIZE  # noqa: E731  # as the parameter it stands for
    residency = Residency([[one] for one in pages], BLOCKS, limit, from_cache=True)  # type: ignore[list-item]  # stands for spans
    for turn in range(4):
        log.clear()
        for piece in passes(kind):
            residency.use(piece)
            assert pages[piece].there
            assert sum(one.there for one in pages) <= 2 + pinned
        if turn == 3:
            directions = 2 if kind == "training" else 1
            assert len(log) <= directions * (BLOCKS - pinned) + PARTS


def test_pinned_blocks_are_spread() -> None:
    """No two gaps between them differ by more than the golden ratio's three sizes allow."""
    pages = [Pages([], number, SIZE) for number in range(BLOCKS + PARTS)]
    residency = Residency([[one] for one in pages], BLOCKS, lambda: 8 * SIZE, from_cache=True)  # type: ignore[list-item]  # stands for spans
    residency.use(0)
    pinned = sorted(residency._pinned)
    gaps = [b - a for a, b in pairwise(pinned)]
    assert len(pinned) == 6
    assert max(gaps) <= 3 * min(gaps)
