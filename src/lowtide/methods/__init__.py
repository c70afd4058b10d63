"""Methods by name, and the gradients of one batch.

A new method is one file and one line in METHODS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

from torch import Tensor

from lowtide.errors import ConfigError, DataError
from lowtide.model.adapter import Adapter
from lowtide.model.batch import Batch
from lowtide.model.decoder import Decoder
from lowtide.model.neftune import Noise
from lowtide.ops.products import use_products

from .autograd import Autograd
from .base import GradSink, Method, Step
from .lcsb import Lcsb
from .mebp import Mebp
from .mesp import Mesp
from .mezo import Mezo
from .options import MethodOptions, check_options

__all__ = [
    "METHODS",
    "GradSink",
    "Gradients",
    "Method",
    "MethodOptions",
    "Step",
    "check_options",
    "get_method",
    "gradients",
]

METHODS: dict[str, Callable[[MethodOptions], Method]] = {
    "mesp": Mesp,
    "mebp": Mebp,
    "mezo": Mezo,
    "lcsb": Lcsb,
    "autograd": Autograd,
}


def get_method(name: str, options: MethodOptions | None = None) -> Method:
    """A fresh instance of the method of that name.

    Args:
        name: a key of METHODS.
        options: the method's own, or settings that hold them; the defaults when None.

    Returns:
        The method, without buffers yet.

    Raises:
        ConfigError: there is no such method, or an option belongs to another one.
    """
    if name not in METHODS:
        near = get_close_matches(name, METHODS, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown method {name!r}; choose {', '.join(METHODS)}.{hint}")
    options = options or MethodOptions()
    check_options(name, options)
    use_products(options.products)
    return METHODS[name](options)


@dataclass(frozen=True)
class Gradients:
    """Result of `gradients`: mean loss per labelled token, their number, gradients by PEFT name."""

    loss: float
    n_tokens: int
    grads: dict[str, Tensor]


class _Collect:
    """A sink that keeps every gradient."""

    def __init__(self) -> None:
        self.grads: dict[str, Tensor] = {}

    def add(self, name: str, grad: Tensor) -> None:
        self.grads[name] = grad


def gradients(
    model: Decoder,
    adapter: Adapter,
    batch: Batch,
    method: str | Method = "mesp",
    dropout_seed: int | None = None,
    *,
    seed: int = 0,
    neftune_noise_alpha: float | None = None,
) -> Gradients:
    """Gradients of the mean loss per labelled token, for every LoRA parameter.

    Args:
        model: the frozen model.
        adapter: the LoRA matrices.
        batch: sequences and labels.
        method: a name out of METHODS, or an instance (which keeps its buffers).
        dropout_seed: seed of LoRA dropout; None turns it off.
        seed: of what is drawn at random (mezo's directions, noise).
        neftune_noise_alpha: noise on the embeddings (arXiv 2310.05914); None for none.

    Returns:
        Loss in nats, labelled tokens, and gradients shaped like their parameters (of lcsb: those
        of the blocks that are up).

    Raises:
        ConfigError: there is no such method.
        DataError: no position carries a label, or a sequence does not fit the model.
        TrainingError: the loss is not finite.
    """
    chosen = get_method(method) if isinstance(method, str) else method
    check_batch(model, batch)
    sink = _Collect()
    noise = None if neftune_noise_alpha is None else Noise(neftune_noise_alpha, seed)
    step = Step(1.0 / batch.n_tokens, dropout_seed, seed=seed, noise=noise)
    total = chosen.step(model, adapter, batch, sink, step)
    grads = {name: sink.grads[name] for name, _ in adapter.items() if name in sink.grads}
    return Gradients(total / batch.n_tokens, batch.n_tokens, grads)


def check_batch(model: Decoder, batch: Batch) -> None:
    """Refuse a batch that the model cannot take or learn from.

    Args:
        model: for its vocabulary and positions.
        batch: what it is about to take.

    Raises:
        DataError: says which.
    """
    model.check_sequences(batch.lengths, batch.largest_id)
    if batch.n_tokens == 0:
        raise DataError(
            "no position of this batch carries a label, so there is nothing to learn from. A "
            "sequence needs at least two tokens and one label that is not -100 after the first."
        )
