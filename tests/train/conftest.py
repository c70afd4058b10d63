"""A small model to compute with, and a small disk to write to."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import lowtide as lt
from lowtide.model.decoder import Decoder


@pytest.fixture
def decoder(model: Path) -> Decoder:
    """The model in float64, where two ways to the same number differ by rounding only."""
    return lt.load_model(model, "float64")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.5 MB, mounted; mounting needs the right to, which root has."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "none", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    yield disk
    if disk.is_mount():
        subprocess.run(["umount", str(disk)], check=True)
