"""Token by token, with keys and values of earlier tokens kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowtide.errors import ConfigError, DataError, TrainingError
from lowtide.model.adapter import Adapter
from lowtide.model.block import block_forward
from lowtide.model.decoder import Decoder
from lowtide.model.forward import blocks_forward, embed, head_logits, workspace_for
from lowtide.model.row_norms import RowNorms
from lowtide.ops.attention import Segment

_PREFILL_TOKENS = 256


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedily at temperature 0, else sampled from the top-p set."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            ConfigError: names the value and the range.
        """
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature is {self.temperature}; expected 0 or more.")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p is {self.top_p}; expected 0 < top_p <= 1.")


class _Cache:
    """Keys and values of one layer, `(capacity, kv_width)` each."""

    def __init__(self, capacity: int, width: int, dtype: torch.dtype) -> None:
        self._k = torch.empty(capacity, width, dtype=dtype)
        self._v = torch.empty(capacity, width, dtype=dtype)
        self._used = 0

    def shorten(self, length: int) -> None:
        self._used = length

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        stop = self._used + len(k)
        self._k[self._used : stop] = k
        self._v[self._used : stop] = v
        self._used = stop
        return self._k[:stop], self._v[:stop]


class Generation:
    """A sequence being generated: its caches and buffers, which serve one sequence after another.

    Pages of the caches that no sequence has reached are not backed by memory.
    """

    def __init__(self, model: Decoder, adapter: Adapter | None, capacity: int) -> None:
        """Make room for `capacity` tokens, prompt included."""
        spec = model.spec
        self._model, self.capacity = model, capacity
        chunk = min(_PREFILL_TOKENS, capacity)
        self._ws = workspace_for(model, chunk, capacity)
        self._rows = torch.empty(2, chunk, spec.hidden_size, dtype=model.compute_dtype)
        self._caches = [
            _Cache(capacity, spec.kv_width, model.compute_dtype) for _ in range(spec.num_layers)
        ]
        self._fed: list[int] = []
        self.adapt(adapter)

    def adapt(self, adapter: Adapter | None) -> None:
        """Go on with another adapter; what was read before is forgotten."""
        layers = range(self._model.spec.num_layers)
        self.adapter = adapter
        norms = RowNorms(adapter, self._ws.tile)
        self._blocks = [self._model.block(i, adapter, None, norms) for i in layers]
        self._forget(0)

    def _forget(self, kept: int) -> None:
        """Keep the first `kept` tokens only; 0 also after a failure that left caches uneven."""
        self._fed = self._fed[:kept] if kept else []
        self._position = kept
        for cache in self._caches:
            cache.shorten(kept)

    def rewind(self, ids: Sequence[int]) -> Sequence[int]:
        """Go back to where a sequence begins to differ from what was read.

        Args:
            ids: the sequence, at least one token.

        Returns:
            What is left to feed of it: its last token at least.
        """
        pairs = zip(self._fed, ids, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(self._fed))
        same = min(same, len(ids) - 1)
        if self._model.changes_between(len(ids), len(self._fed)):
            same = 0  # keys were rotated for a longer sequence
        self._forget(same)
        return ids[same:]

    def feed(self, ids: Sequence[int], look: Callable[[], None] | None = None) -> Tensor:
        """Append tokens.

        Args:
            ids: at least one.
            look: called before each part of a long prompt; what it raises ends the reading, and
                all that was read is forgotten.

        Returns:
            The logits `(V,)` after the last one.
        """
        try:
            if self._fed and self._model.changes_between(len(self._fed), len(self._fed) + len(ids)):
                # Earlier keys were rotated for a shorter sequence: all are computed again.
                ids = [*self._fed, *ids]
                self._forget(0)
            self._fed += ids
            x = self._rows[0, :0]
            for start in range(0, len(ids), _PREFILL_TOKENS):
                if look is not None:
                    look()
                x = self._forward(torch.tensor(ids[start : start + _PREFILL_TOKENS]))
            return head_logits(self._model, x[-1:], self._ws)[0]
        except BaseException:
            self._forget(0)
            raise

    def follow(
        self,
        prompt: Sequence[int],
        limit: int,
        sampling: Sampling,
        stop_ids: Collection[int],
        look: Callable[[], None] | None = None,
    ) -> Iterator[int]:
        """Token ids that follow `prompt`, of which all that was read before is not read again.

        Args:
            prompt: at least one token id, and no more than there is room for with `limit`.
            limit: how many to generate at most.
            sampling: how they are chosen.
            stop_ids: tokens that end the text; they are not yielded.
            look: as in `feed`.

        Yields:
            Token ids.
        """
        generator = torch.Generator().manual_seed(sampling.seed)
        fed = self.rewind(prompt)
        for _ in range(limit):
            token = _choose(self.feed(fed, look), sampling, generator)
            if token in stop_ids:
                return
            yield token
            fed = [token]

    def _forward(self, ids: Tensor) -> Tensor:
        count = len(ids)
        stop = self._position + count
        at = self._model.positions_at(
            torch.arange(self._position, stop),
            [Segment(0, count, 0, stop)],
            torch.full((count,), len(self._fed)),
        )
        x, out = self._rows[0, :count], self._rows[1, :count]
        embed(self._model, ids, x)
        for block, cache in zip(self._blocks, self._caches, strict=True):
            block_forward(x, block, at, self._ws, out, cache)
            x, out = out, x
        self._position = stop
        return x


def generate(
    model: Decoder,
    adapter: Adapter | None,
    prompt: Sequence[int],
    max_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
) -> Iterator[int]:
    """Token ids that follow `prompt`, one at a time.

    Args:
        model: the frozen model.
        adapter: LoRA matrices, or None.
        prompt: at least one token id.
        max_tokens: how many to generate at most; fewer where the model's positions end.
        sampling: greedy when None.
        stop_ids: tokens that end the text; they are not yielded.

    Yields:
        Token ids.

    Raises:
        DataError: the prompt is empty, too long, or has ids outside the vocabulary.
        TrainingError: the logits are not finite.
    """
    if not prompt:
        raise DataError("the prompt has no token; start from the BOS token for an empty prompt.")
    model.check_sequences([len(prompt)], max(prompt))
    sampling = sampling or Sampling()
    # The last token needs no position of its own: nothing is computed from it.
    limit = min(max_tokens, model.spec.max_positions - len(prompt) + 1)
    generation = Generation(model, adapter, len(prompt) + max(0, limit - 1))
    yield from generation.follow(prompt, limit, sampling, stop_ids)


def _choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token from logits `(V,)`."""
    best = float(logits.max())  # NaN where any logit is
    if not math.isfinite(best):
        raise TrainingError(
            f"the model's output is {best}, so no token can be chosen: the weights or the adapter "
            "hold values that overflow. Leave --adapter-path out to see which, and train the "
            "adapter again with a lower --learning-rate."
        )
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    probabilities = ((logits.double() - best) / sampling.temperature).softmax(-1)
    if sampling.top_p < 1.0:
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        ordered[before >= sampling.top_p] = 0.0
        probabilities = torch.zeros_like(probabilities).index_copy_(0, order, ordered)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def logits(model: Decoder, adapter: Adapter | None, ids: Sequence[int]) -> Tensor:
    """Logits `(T, V)` of every position of one sequence: for tests and small uses.

    Args:
        model: the frozen model.
        adapter: LoRA matrices, or None.
        ids: token ids, at least one.

    Returns:
        Logits in the compute dtype.

    Raises:
        DataError: the sequence is empty, too long, or has ids outside the vocabulary.
    """
    tokens = [int(token) for token in ids]
    if not tokens or min(tokens) < 0:
        raise DataError("ids must be at least one token id, none negative.")
    model.check_sequences([len(tokens)], max(tokens))
    ws = workspace_for(model, len(tokens), len(tokens))
    rows = torch.empty(2, len(tokens), model.spec.hidden_size, dtype=model.compute_dtype)
    inputs = [rows[layer % 2] for layer in range(model.spec.num_layers + 1)]
    embed(model, torch.tensor(tokens), inputs[0])
    norms = RowNorms(adapter, ws.tile)
    blocks = (model.block(layer, adapter, None, norms) for layer in range(model.spec.num_layers))
    x = blocks_forward(blocks, inputs, model.positions([len(tokens)]), ws)
    return head_logits(model, x, ws)
