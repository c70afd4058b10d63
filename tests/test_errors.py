"""Messages and files that are too long to be read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lowtide.errors import MOST_CONFIG_BYTES, AdapterError, LowtideError, ModelError
from lowtide.export.peft import open_adapter
from lowtide.model.families import read_config, spec_from_config


def test_a_message_that_quotes_something_endless_keeps_its_beginning_and_its_remedy() -> None:
    with pytest.raises(ModelError) as caught:
        spec_from_config({"model_type": "gemma" * 90_000})
    text = str(caught.value)
    assert len(text) < 9_000
    assert re.match(r"model_type 'gemma.* \[[0-9,]+ characters left out\] .*Add a family", text)
    assert str(LowtideError("as it is")) == "as it is"


def test_settings_of_gigabytes_are_not_read(tmp_path: Path) -> None:
    for name in ("config.json", "adapter_config.json"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(MOST_CONFIG_BYTES + 1)
    with pytest.raises(ModelError, match=r"config.json has 16,777,217 bytes; no model's does"):
        read_config(tmp_path)
    with pytest.raises(AdapterError, match=r"has 16,777,217 bytes; no adapter's settings take"):
        open_adapter(tmp_path, None)  # type: ignore[arg-type]
