"""The weights of a model in GGUF files, by Hugging Face name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lowtide.errors import ModelError, listed
from lowtide.weights.base import Weights
from lowtide.weights.checkpoint import dtype_name
from lowtide.weights.matrix import MappedMatrix, ReorderedMatrix, StoredMatrix
from lowtide.weights.storages.base import QuantizedMatrix

from .file import Extent, GgufFile


class Stored(NamedTuple):
    """How a tensor of a model is found in a file.

    Attributes:
        name: in the file.
        order: which row of the file each row is; None where they are in the same order.
        offset: by how much the numbers in the file are larger.
    """

    name: str
    order: Tensor | None = None
    offset: float = 0.0


class GgufWeights(Weights):
    """Tensors on the mapped parts of a model."""

    kind = "GGUF"
    is_plain = False

    def __init__(
        self, file: GgufFile, stored: Mapping[str, Stored], ignored: Iterable[str] = ()
    ) -> None:
        """Map the files; no weight is read.

        Args:
            file: its headers.
            stored: where the model's tensors are.
            ignored: names in the file of tensors that the model has no use for.
        """
        super().__init__(file.files)
        self._file, self._stored, self._ignored = file, stored, set(ignored)
        self._mapped = [_mapped(header.path, header.nbytes) for header in file.headers]

    def __getitem__(self, name: str) -> Tensor:
        """A tensor that is no matrix, as Hugging Face has it."""
        stored = self._stored[name]
        tensor = self._numbers(self._file.extents[stored.name])
        if stored.order is not None:
            tensor = tensor[stored.order]
        return tensor - stored.offset if stored.offset else tensor

    def __contains__(self, name: object) -> bool:
        """See `Weights.__contains__`."""
        place = self._stored.get(name) if isinstance(name, str) else None
        extent = None if place is None else self._file.extents.get(place.name)
        return extent is not None and isinstance(extent.kind, torch.dtype)

    def matrix(self, name: str, shape: tuple[int, int], compute_dtype: torch.dtype) -> StoredMatrix:
        """See `Weights.matrix`."""
        stored = self._stored[name]
        extent = self._file.extents[stored.name]
        found: StoredMatrix
        if isinstance(extent.kind, torch.dtype):
            found = MappedMatrix(self._numbers(extent), compute_dtype)
        else:
            blocks = self._bytes(extent).view(shape[0], -1)
            found = QuantizedMatrix(extent.kind, {"blocks": blocks}, shape, compute_dtype)
        return found if stored.order is None else ReorderedMatrix(found, stored.order)

    def stored_as(self, name: str) -> str:
        """See `Weights.stored_as`."""
        kind = self._file.extents[self._stored[name].name].kind
        return dtype_name(kind) if isinstance(kind, torch.dtype) else kind.name

    def stored_bytes(self, name: str) -> int:
        """See `Weights.stored_bytes`."""
        return self._file.extents[self._stored[name].name].nbytes

    def check(self, expected: Mapping[str, tuple[int, ...]], optional: Iterable[str] = ()) -> None:
        """See `Weights.check`."""
        self._file.require_known()
        problems, known = [], set(self._ignored)
        shapes = self._file.shapes
        for name, shape in expected.items():
            place = self._stored[name]
            known.add(place.name)
            what = f"{place.name} ({name})"
            if place.name not in shapes:
                problems.append(f"missing: {what} {list(shape)}")
            elif shapes[place.name] != shape:
                problems.append(
                    f"wrong shape: {what} is {list(shapes[place.name])}, the metadata asks for "
                    f"{list(shape)}"
                )
            elif place.name in self._file.extents and len(shape) != 2 and name not in self:
                problems.append(f"dtype {self.stored_as(name)}: {what} (expected numbers)")
        problems += [
            f"extra: {name} {list(shape)}" for name, shape in shapes.items() if name not in known
        ]
        if problems:
            raise ModelError(
                f"the tensors in {self._file.path} do not fit its metadata:\n{listed(problems)}\n"
                "Download the file again, or make it again with a current llama.cpp."
            )

    def _numbers(self, extent: Extent) -> Tensor:
        assert isinstance(extent.kind, torch.dtype)
        return self._bytes(extent).view(extent.kind).view(extent.shape)

    def _bytes(self, extent: Extent) -> Tensor:
        empty = torch.empty(0, dtype=torch.uint8)
        found: Tensor = empty.set_(self._mapped[extent.part], extent.start, (extent.nbytes,), (1,))
        return found


def _mapped(path: Path, nbytes: int) -> torch.UntypedStorage:
    """A whole file on mapped memory."""
    try:
        found = torch.UntypedStorage.from_file(str(path), False, nbytes)
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{path} cannot be mapped: {error}") from error
    assert isinstance(found, torch.UntypedStorage)
    return found
