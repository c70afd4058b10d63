"""What tells one model or data set from another, so that a run goes on with its own only."""

from __future__ import annotations

import hashlib
import json
import os

import torch

import lowtide
from lowtide.model.decoder import Decoder
from lowtide.ops.products import goes_to_onednn

_SAMPLES, _SAMPLE_BYTES = 256, 4096


def model_fingerprint(model: Decoder) -> str:
    """SHA-256 of config.json and of samples of the weight files.

    A file counts by its size and 4 KB at 256 evenly spaced places, its header among them: 1 MB is
    read where all would be gigabytes. Another training of the same shape differs in nearly every
    byte; a file that differs in a few places only may pass for the same.

    Args:
        model: open.

    Returns:
        Hexadecimal.
    """
    config = json.loads((model.directory / "config.json").read_bytes())
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in model.checkpoint.files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            size = os.fstat(descriptor).st_size
            digest.update(str(size).encode())
            for number in range(_SAMPLES):
                digest.update(os.pread(descriptor, _SAMPLE_BYTES, number * size // _SAMPLES))
        finally:
            os.close(descriptor)
    return digest.hexdigest()


def arithmetic(tiles: str) -> dict[str, str]:
    """What rounding depends on beside the run's settings: where it changes, so do last digits.

    Args:
        tiles: their size, which a memory budget may have chosen.

    Returns:
        Words by what they are of, as they are in this process now.
    """
    return {
        "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "products": "oneDNN" if goes_to_onednn() else "torch",
        "tiles": tiles,
    }


def version() -> str:
    """Of lowtide."""
    return lowtide.__version__
