"""What a method keeps between steps: the workspace, and rows for block inputs."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

from lowtide.errors import LowtideWarning, OutputError
from lowtide.memory.available import is_memory
from lowtide.model.batch import Batch
from lowtide.model.decoder import Decoder
from lowtide.model.forward import workspace_for
from lowtide.model.workspace import Workspace


class Buffers:
    """Made for the largest batch seen; made again only when a larger one comes."""

    def __init__(
        self, block_inputs: str = "memory", tiles: str = "full", scratch_dir: str | None = None
    ) -> None:
        """No buffer is made before `reserve` or the first batch.

        Args:
            block_inputs: `memory`, or `file` for rows in a mapped scratch file.
            tiles: of the workspace.
            scratch_dir: directory of that file; None takes TMPDIR.
        """
        self._in_file = block_inputs == "file"
        self._tiles, self._scratch_dir = tiles, scratch_dir
        self._max_tokens = self._max_length = 0
        self._ws: Workspace | None = None
        self._rows: Tensor | None = None
        self._for: Decoder | None = None

    @property
    def max_tokens(self) -> int:
        """Tokens of the largest batch so far."""
        return self._max_tokens

    def reserve(self, model: Decoder, tokens: int, longest: int, rows: int) -> None:
        """Make room for batches of that many tokens; see `Method.reserve`.

        What a smaller batch does not touch costs no memory.
        """
        self._make(model, tokens, longest, rows)

    def release(self) -> None:
        """Free the buffers; the next batch makes them again, for the largest seen."""
        self._ws = self._rows = self._for = None

    def for_batch(self, model: Decoder, batch: Batch, rows: int) -> tuple[Workspace, Tensor]:
        """The workspace, and `(rows, T, H)` for block inputs.

        Args:
            model: the frozen model.
            batch: gives T.
            rows: how many block inputs.

        Returns:
            Buffers with the content of the last step.

        Raises:
            OutputError: the scratch file does not fit on its disk.
        """
        tokens, hidden = sum(batch.lengths), model.spec.hidden_size
        ws, flat = self._make(model, tokens, max(batch.lengths), rows)
        return ws, flat[: rows * tokens * hidden].view(rows, tokens, hidden)

    def _make(
        self, model: Decoder, tokens: int, longest: int, rows: int
    ) -> tuple[Workspace, Tensor]:
        ws, flat = self._ws, self._rows
        if ws is None or self._for is not model or not ws.fits(tokens, longest):
            self._max_tokens = max(self._max_tokens, tokens)
            self._max_length = max(self._max_length, longest)
            self._ws = self._rows = ws = flat = None  # freed before new ones are made
            ws = self._ws = workspace_for(model, self._max_tokens, self._max_length, self._tiles)
            self._for = model
        needed = rows * self._max_tokens * model.spec.hidden_size
        if flat is None or flat.numel() < needed:
            self._rows = flat = None
            if self._in_file:
                scratch = Path(self._scratch_dir or tempfile.gettempdir()).expanduser()
                flat = self._rows = _rows_in_file(needed, model.compute_dtype, scratch)
            else:
                flat = self._rows = torch.empty(needed, dtype=model.compute_dtype)
        return ws, flat


def _rows_in_file(numel: int, dtype: torch.dtype, scratch: Path) -> Tensor:
    size = numel * dtype.itemsize
    try:
        descriptor, path = tempfile.mkstemp(prefix="lowtide-block-inputs-", dir=scratch)
    except OSError as error:
        raise OutputError(
            f"no scratch file for block inputs can be made in {scratch}: {error.strerror}. Give a "
            "directory on a disk with --scratch-dir, or leave --block-inputs out."
        ) from error
    try:
        if is_memory(scratch):
            warnings.warn(
                f"{scratch} is on tmpfs, which is memory: the {size / 1e6:,.1f} MB of block inputs "
                "in it are not saved but moved out of peak_anon_bytes. Give a directory on a disk "
                "with --scratch-dir.",
                LowtideWarning,
                stacklevel=2,
            )
        os.posix_fallocate(descriptor, 0, size)  # a full disk is told now, not by a signal later
        return torch.from_file(path, shared=True, size=numel, dtype=dtype)
    except OSError as error:
        raise OutputError(
            f"block inputs need {size / 1e6:,.1f} MB of disk at {scratch}: {error.strerror}. Give "
            "a directory on another disk with --scratch-dir, or leave --block-inputs out."
        ) from error
    finally:
        os.close(descriptor)
        os.unlink(path)  # the mapping keeps it alive, and nothing is left behind
