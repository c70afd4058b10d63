"""The registry of quantised storages: the name that `--quantize` takes -> how matrices lie on disk.

A new storage is one file here, with a class as in `base.Storage`, and one line in STORAGES.
"""

from __future__ import annotations

from .base import Storage
from .int4 import Int4
from .int8 import Int8

STORAGES: dict[str, Storage] = {
    storage.name: storage
    for storage in (
        Int8("int8"),
        Int4("int4", group_size=32),
        Int4("int4-g64", group_size=64),
        Int4("int4-asym", group_size=32, symmetric=False),
        Int4("int4-asym-g64", group_size=64, symmetric=False),
    )
}
