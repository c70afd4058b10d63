"""Settings as YAML files: read by `--config`, written as run.yaml."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lowtide.errors import ConfigError


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        path: the file.

    Returns:
        The mapping; empty for an empty file.

    Raises:
        ConfigError: the file is missing, not YAML, or not a mapping.
    """
    from lowtide.plain_yaml import load_plain_yaml

    try:
        content = load_plain_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"--config {path}: there is no such file.") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path} cannot be read as YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} holds {type(content).__name__}; expected key: value.")
    return content


def to_yaml(settings: Any) -> str:
    """The settings as YAML that `--config` reads back."""
    from lowtide.plain_yaml import dump_plain_yaml

    return dump_plain_yaml(dataclasses.asdict(settings))
