"""What a patched model returns: a loss, and logits that are formed when somebody looks at them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

TRL_OUTPUTS = frozenset({"log_probs", "entropy", "is_top1"})
"""Of what TRL's fused head can be asked for, what comes out of lowtide's sweep."""


def _getter(name: str) -> Any:
    """What `__torch_function__` is told when an attribute of a tensor is read."""
    return getattr(Tensor, name).__get__


_KNOWN = (
    *(_getter(name) for name in ("shape", "dtype", "ndim", "requires_grad", "grad_fn")),
    *(Tensor.size, Tensor.dim, Tensor.__len__),
)
"""What is known of logits before they are formed."""


class LazyLogits(Tensor):
    """Logits `(B, S, V)` that another call of the model forms when they are used.

    Shape, dtype and device are known before. In the compute dtype, so that nobody widens them.
    """

    make: Callable[[], Tensor]
    _made: Tensor | None
    _device: torch.device

    @staticmethod
    def of(shape: Sequence[int], like: Tensor, make: Callable[[], Tensor]) -> LazyLogits:
        """Logits of that shape and of the dtype and device of `like`, which `make` forms."""
        blank = torch.empty(tuple(shape), dtype=like.dtype, device="meta")
        lazy = blank.as_subclass(LazyLogits)
        lazy.make, lazy._made, lazy._device = make, None, like.device
        return lazy

    def formed(self) -> Tensor:
        """The logits, formed at the first call."""
        if self._made is None:
            self._made = self.make().to(self.dtype)
        return self._made

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func == _getter("device"):
                return args[0]._device
            if func in _KNOWN:
                return func(*args, **(kwargs or {}))
        real = functools.partial(tree_map, lambda a: a.formed() if isinstance(a, cls) else a)
        return func(*real(list(args)), **real(dict(kwargs or {})))


def model_output(loss: Tensor, logits: LazyLogits) -> Any:
    """transformers' output of a causal LM."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return CausalLMOutputWithPast(loss=loss, logits=logits)


def trl_settings(forward: Any) -> dict[str, Any]:
    """What TRL's fused head was made with, from the forward that it put on the model.

    Args:
        forward: of the causal LM.

    Returns:
        Names and values; empty where the forward is not TRL's.
    """
    function = getattr(forward, "__func__", forward)
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None) or ()
    if code is None or "outputs" not in code.co_freevars:
        return {}
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}


def is_ours(settings: Mapping[str, Any]) -> bool:
    """Whether lowtide's sweep gives all that TRL's fused head was made to give."""
    return (
        set(settings.get("outputs", ("?",))) <= TRL_OUTPUTS
        and settings.get("temperature") == 1.0
        and not settings.get("cast_lm_head_to_fp32")
    )


def trl_output(mask: Tensor, loss: Tensor, parts: Mapping[str, Tensor]) -> Any:
    """TRL's output of a fused head.

    Args:
        mask: `(B, S - 1)` or `(B, S)`, which positions have a label.
        loss: the normalised one.
        parts: `(n_tokens,)` by name.

    Returns:
        Its fields are zero where there is no label.
    """
    # Whoever asks for a fused head has imported TRL.
    kind = sys.modules["trl.trainer.utils"].FusedCausalLMOutput
    fields = {
        name: part.new_zeros(mask.shape).masked_scatter(mask, part) for name, part in parts.items()
    }
    return kind(loss=loss, label_mask=mask, **fields)
