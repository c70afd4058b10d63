"""`patch`: two forwards of one model are replaced, its own and its backbone's, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lowtide.errors import ConfigError
from lowtide.model.batch import IGNORED
from lowtide.model.row_norms import RowNorms
from lowtide.model.workspace import Workspace
from lowtide.ops.cross_entropy import Distribution

from . import arguments, functions, outputs
from .inner import Inner, read_inner, spec_of
from .support import require_eager, require_peft, require_supported

_HANDLE = "_lowtide_patch"
"""Where a patched model keeps its handle, so that a copy of it has one too."""


class _Forward:
    """A forward of a patch; an object, since wrappers bind a method's function to the model."""

    def __init__(self, patch: Patch, name: str) -> None:
        self._patch, self._name = patch, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self._patch._model:  # bound to it, as accelerate's unwrapping does
            args = args[1:]
        return getattr(self._patch, self._name)(*args, **kwargs)


class Patch:
    """A patched model; `unpatch` gives it back. Usable as a context manager."""

    def __init__(self, model: Any) -> None:
        """Patch `model`; see `patch`."""
        require_peft(model)
        if patch_of(model) is not None:
            raise ConfigError("this model is patched already; unpatch it first, or use its handle.")
        self._spec = spec_of(model.get_base_model())
        require_supported(model)
        self._model = model
        self._backbone = model.get_base_model().base_model
        if "forward" in vars(self._backbone):
            raise ConfigError(
                f"the forward of {type(self._backbone).__name__} was replaced, by accelerate or a "
                "kernel library; undo that before the model is patched."
            )
        read_inner(model, self._spec)
        self._ws: Workspace | None = None
        self._before = vars(model).get("forward")
        self._active = True
        self._forwards = _Forward(self, "_model_forward"), _Forward(self, "_backbone_forward")
        model.forward, self._backbone.forward = self._forwards
        setattr(model, _HANDLE, self)

    def unpatch(self) -> None:
        """Put back what was there, and free the buffers. A second call does nothing."""
        self._active, self._ws = False, None
        # Somebody who wrapped ours since then keeps calling it, and it calls what was there.
        modules, befores = (self._model, self._backbone), (self._before, None)
        for module, ours, before in zip(modules, self._forwards, befores, strict=True):
            found = vars(module).get("forward")
            if getattr(found, "__func__", found) is ours:
                del module.forward
                if before is not None:
                    module.forward = before
        vars(self._model).pop(_HANDLE, None)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.unpatch()

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a patched model, made in memory or by pickle, is patched by itself."""
        return {**self.__dict__, "_ws": None}

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The PEFT model's: a call with labels is ours."""
        kind = type(self._model)
        before = self._before or kind.forward.__get__(self._model)
        if not self._active:
            return before(*args, **kwargs)
        call = arguments.bound(kind.forward, args, kwargs)
        labelled = "labels" in call or "shift_labels" in call
        prepared = self._prepare(call) if labelled and self._gives(call) else None
        if prepared is None:
            return before(*args, **kwargs)

        def logits() -> Tensor:
            """By a call of their own, without labels."""
            left = {"labels", "shift_labels", "num_items_in_batch"}
            found = before(**{name: value for name, value in call.items() if name not in left})
            return cast(Tensor, found.logits)

        return self._output(call, prepared, logits)

    def _backbone_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The backbone's: a call that a gradient may be asked of, in training, is ours."""
        before = type(self._backbone).forward.__get__(self._backbone)
        training = self._active and self._backbone.training and torch.is_grad_enabled()
        call = arguments.bound(type(self._backbone).forward, args, kwargs)
        prepared = self._prepare(call) if training else None
        if prepared is None:
            return before(*args, **kwargs)
        from transformers.modeling_outputs import BaseModelOutputWithPast

        x = functions.blocks(prepared.x, prepared.run).to(prepared.dtype)
        hidden = prepared.laid.padded(self._backbone.norm(x))
        return BaseModelOutputWithPast(last_hidden_state=hidden)

    def _gives(self, call: dict[str, Any]) -> bool:
        """Whether what the call wants comes out of lowtide's sweep; TRL's head may want more."""
        if not call.get("fused_lm_head"):
            return True
        return outputs.is_ours(outputs.trl_settings(self._model.get_base_model().forward))

    def _prepare(self, call: dict[str, Any]) -> _Prepared | None:
        """Check, read the model as it is now, and embed; None where adapters are switched off."""
        require_eager()
        require_supported(self._model)
        inner = read_inner(self._model, self._spec)
        if inner.adapter is None:
            return None
        arguments.require_known(call)
        embeds = call.get("inputs_embeds")
        if embeds is None:
            embeds = self._backbone.embed_tokens(call["input_ids"])
            if embeds.is_leaf:  # it requires a gradient for checkpointing's sake only
                embeds = embeds.detach()
        decoder = inner.decoder
        laid = arguments.lay_out(embeds, call, decoder)
        x = embeds.reshape(-1, embeds.shape[-1])[laid.places].to(decoder.compute_dtype)
        if self._spec.noise_scale != 1.0:
            x = x * self._spec.noise_scale
        ws = self._workspace(inner, laid)
        seed = None
        if self._model.training and inner.adapter.drops:
            seed = int(torch.randint(1 << 62, (1,), device="cpu"))
        norms = RowNorms(inner.adapter, ws.tile)
        run = functions.Run(inner, inner.adapter, laid.at, ws, seed, norms)
        return _Prepared(run, laid, x, embeds.dtype)

    def _workspace(self, inner: Inner, laid: arguments.Laid) -> Workspace:
        """Made for the largest batch seen; made again when a larger one comes, or elsewhere."""
        ws, dtype = self._ws, inner.decoder.compute_dtype
        tokens, longest = sum(laid.lengths), max(laid.lengths)
        if ws is not None and (ws.dtype, ws.tile.device) != (dtype, inner.device):
            ws = None
        if ws is None or not ws.fits(tokens, longest):
            if ws is not None:
                tokens, longest = max(tokens, ws.max_tokens), max(longest, ws.max_length)
            self._ws = ws = None  # freed before a larger one is made
            self._ws = ws = Workspace(self._spec, tokens, longest, dtype, device=inner.device)
        return ws

    def _output(
        self, call: dict[str, Any], prepared: _Prepared, logits: Callable[[], Tensor]
    ) -> Any:
        """Blocks and loss, and what the caller expects of them."""
        run, laid = prepared.run, prepared.laid
        targets = arguments.targets_of_call(call, laid.shape)
        batch = arguments.batch_of(targets, laid)
        x = functions.blocks(prepared.x, run)
        fused = bool(call.get("fused_lm_head"))
        count = batch.n_tokens
        distribution = Distribution(count, x.detach()) if fused else None
        losses, entropy = functions.losses_of(x, run, batch, distribution)
        items = call.get("num_items_in_batch")
        if items is None:
            items = max(count, 1) if fused else count
        loss = losses.sum() / torch.as_tensor(items, device=losses.device)
        if distribution is None:
            shape = (*laid.shape, self._spec.vocab_size)
            return outputs.model_output(loss, outputs.LazyLogits.of(shape, x, logits))
        mask = (targets if "shift_labels" in call else targets[:, :-1]) != IGNORED
        top1 = distribution.best == batch.targets[batch.labelled]
        parts = {"log_probs": -losses, "entropy": cast(Tensor, entropy), "is_top1": top1}
        return outputs.trl_output(mask, loss, parts)


class _Prepared(NamedTuple):
    """A call ready to run: `x (T, H)` are the embeddings, `dtype` the model's of hidden states."""

    run: functions.Run
    laid: arguments.Laid
    x: Tensor
    dtype: torch.dtype


def patch(model: Any) -> Patch:
    """Let a causal LM under PEFT's LoRA train by lowtide's structured backward.

    Args:
        model: of `peft.get_peft_model`, or `trainer.model`; before or after a trainer has it.

    Returns:
        Its handle, to unpatch it; or leave a `with` block.

    Raises:
        ConfigError: the model is no such model, is patched already, or has something that is not
            supported; all of it is listed.
        ModelError: its family is not known, or its modules do not fit its config.
    """
    return Patch(model)


def patch_of(model: Any) -> Patch | None:
    """The handle of a patched model, a copy's own one too; None where it is not patched."""
    found: Patch | None = vars(model).get(_HANDLE)
    return found


def unpatch(model: Any) -> None:
    """Unpatch a model whose handle is not at hand, such as a copy of a patched one.

    Args:
        model: if it is not patched, nothing happens.
    """
    handle = patch_of(model)
    if handle is not None:
        handle.unpatch()
