"""Adapters to be merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers import random_adapter

import lowtide as lt


def write_adapter(model: Path, directory: Path, **settings: Any) -> Path:
    """An adapter that changes weights by about as much as they are."""
    config = lt.LoraConfig(**{"r": 3, "lora_alpha": 7.0, **settings})
    random_adapter(lt.load_model(model), config).save(directory)
    return directory
