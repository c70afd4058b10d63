"""The small files of a model directory that go along when its weights are written anew."""

from __future__ import annotations

from pathlib import Path

from lowtide.weights.checkpoint import INDEX_FILE
from lowtide.weights.manifest import MANIFEST_FILE

CONFIG_FILE = "config.json"
_COPIED = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "LICENSE*", "NOTICE*")
_OF_THE_WEIGHTS = (CONFIG_FILE, INDEX_FILE, MANIFEST_FILE)


def side_files(directory: Path) -> list[Path]:
    """Files to be copied byte for byte: the tokenizer's, generation_config.json, licences.

    Args:
        directory: a model directory.

    Returns:
        Their paths, sorted; without config.json, which says how the weights are stored, and what
        describes the weight files.
    """
    paths = {path for pattern in _COPIED for path in directory.glob(pattern)}
    return sorted(p for p in paths if p.is_file() and p.name not in _OF_THE_WEIGHTS)
