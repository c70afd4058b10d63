"""How many threads a model gets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import lowtide as lt
from lowtide.demo.assets import asset_dir
from lowtide.model.threads import set_threads


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("cores", "expected"), [(2, 2), (3, 3), (64, 3)])
def test_tiny_models_get_one_thread_and_others_the_cores(
    cores: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowtide.model.threads.usable_cores", lambda: cores)
    tiny = lt.load_model(asset_dir()).spec
    set_threads(replace(tiny, hidden_size=576, intermediate_size=1536), None)
    assert torch.get_num_threads() == expected
    set_threads(tiny, None)
    assert torch.get_num_threads() == 1


def test_the_users_number_wins() -> None:
    set_threads(lt.load_model(asset_dir()).spec, 2)
    assert torch.get_num_threads() == 2
