"""What an allocation is for, and what a moment of a step is called, from the frames on the stack.

The tables are the only place that knows which module allocates what; methods, operations and model
know nothing of them.
"""

from __future__ import annotations

from types import FrameType
from typing import NamedTuple

KINDS = (
    "adapter", "gradients", "optimizer", "block inputs", "buffers", "block intermediates",
    "loss", "model", "allocator", "other",
)  # fmt: skip

# Functions that say what they allocate for, and modules. The innermost function of the first table
# on the stack decides; without one, the innermost module of the second, by its longest prefix.
# Most operations are in neither: they work for whoever calls them.
_FUNCTIONS = {
    "methods.mebp._loss_backward_": "loss",
    "methods.mezo._move": "adapter",
    "model.decoder.positions": "block intermediates",
    "model.decoder.positions_at": "block intermediates",
    "model.forward.loss_backward_": "loss",
    "model.forward.loss_forward": "loss",
    "model.reference.reference_block": "block intermediates",
    "model.reference.reference_head": "loss",
    "model.reference.reference_logits": "block intermediates",
    "model.reference.reference_loss": "loss",
}
_MODULES = {
    "export.peft": "adapter",
    "methods": "block intermediates",
    "methods.buffers": "block inputs",
    "methods.mezo": "gradients",
    "model": "block intermediates",
    "model.adapter": "adapter",
    "model.batch": "other",
    "model.block_inputs": "block inputs",
    "model.decoder": "model",
    "model.stored_h": "buffers",
    "model.workspace": "buffers",
    "ops.cross_entropy": "loss",
    "train.adafactor": "optimizer",
    "train.optim": "optimizer",
    "train.sink": "gradients",
    "train.states": "optimizer",
}
_BLOCKS = ("block_backward", "block_forward", "reference_block")
_PACKAGE = __name__.split(".")[0] + "."
_NOT_THE_STEP = ("memory.", "bench.", "cli.")


class Place(NamedTuple):
    """A function of the package on the stack, and its kinds by both tables."""

    module: str
    function: str
    by_function: str | None
    by_module: str | None


class Stack:
    """The package's frames, innermost first. Remembers every function met."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._places: dict[object, Place | None] = {}

    def places(self, frame: FrameType | None) -> list[Place]:
        """Places on the stack, from `frame` outwards."""
        found = []
        while frame is not None:
            code = frame.f_code
            if code not in self._places:
                self._places[code] = _place(str(frame.f_globals.get("__name__", "")), code.co_name)
            place = self._places[code]
            if place is not None:
                found.append(place)
            frame = frame.f_back
        return found


def _place(module: str, function: str) -> Place | None:
    if not module.startswith(_PACKAGE):
        return None
    module = module.removeprefix(_PACKAGE)
    if module.startswith(_NOT_THE_STEP):
        return None
    return Place(module, function, _FUNCTIONS.get(f"{module}.{function}"), _by_module(module))


def _by_module(module: str) -> str | None:
    while module:
        if module in _MODULES:
            return _MODULES[module]
        module = module.rpartition(".")[0]
    return None


def kind_of(places: list[Place]) -> str:
    """What an allocation made from here is for.

    Args:
        places: the package's frames, innermost first.

    Returns:
        One of KINDS.
    """
    by_function = next((place.by_function for place in places if place.by_function), None)
    by_module = next((place.by_module for place in places if place.by_module), "other")
    return by_function or by_module


def where(places: list[Place], block: int | None, node: str | None) -> str:
    """A moment's name for people, such as `backward of block 3: glu_backward`.

    Args:
        places: the package's frames, innermost first.
        block: whose weights are in use, where that is known.
        node: autograd's node that is being run, or None.

    Returns:
        The loss, or direction, block and operation, or the outermost function of the step.
    """
    updating = any(place.by_module == "optimizer" for place in places)
    places = [p for p in places if not p.module.startswith(("weights.", "train."))]
    operations = [place.function for place in places if place.module.startswith("ops.")]
    operation = operations[-1] if operations else None
    names = [place.function for place in places]
    if kind_of(places) == "loss":
        return f"loss: {operation or node}" if operation or node else "loss"
    within = next((i for i, name in enumerate(names) if name in _BLOCKS), None)
    if within is None and node is None:
        return "optimizer" if updating else (operation or (names[-1] if names else "between steps"))
    backward = node is not None or (within is not None and names[within] == "block_backward")
    direction = "backward" if backward else "forward"
    if within is not None and operation is None:
        operation = names[max(0, within - 1)].strip("_")
    of = "" if block is None else f" of block {block}"
    return f"{direction}{of}: {'optimizer' if updating else operation or node}"
