"""Options of the methods, declared once for every command that runs one."""

from __future__ import annotations

from dataclasses import dataclass, fields

from lowtide.config import flag, setting
from lowtide.errors import ConfigError, listed
from lowtide.model.workspace import TILES
from lowtide.ops.products import CHOICES


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """Options of the method."""

    recompute_h: bool = setting(
        True, help="mesp: form h = x A^T again in the backward; no keeps it from the forward"
    )
    mebp_loss: str = setting(
        "sweep",
        help="mebp: sweep over vocabulary tiles, or the full logits with autograd",
        choices=("sweep", "full"),
    )
    block_inputs: str = setting(
        "memory",
        help="mesp, mebp: where block inputs are kept; file is a mapped scratch file",
        choices=("memory", "file"),
        changeable=True,
    )
    keep_blocks: int = setting(
        0,
        help="mesp: how many of the last blocks keep their intermediates for the backward instead "
        "of recomputing them: faster, and more memory",
        minimum=0,
        changeable=True,
    )
    tiles: str = setting(
        "full",
        help="mesp, lcsb, mezo: size of the tiles of weights and activations; smaller ones take "
        "less memory and more time",
        choices=tuple(TILES),
    )
    products: str = setting(
        "auto",
        help="where float32 products go: auto takes oneDNN on processors where it is twice as fast "
        "as torch's own library, at half a MB for each shape of a product; torch leaves all to "
        "torch",
        choices=CHOICES,
    )
    scratch_dir: str | None = setting(
        None,
        help="mesp, mebp: directory on a disk for the file of block inputs; none takes TMPDIR",
        filled=True,
        changeable=True,
    )
    zo_eps: float = setting(1e-3, help="mezo: how far the two forwards step from theta", above=0)
    zo_directions: int = setting(1, help="mezo: random directions per step", minimum=1)
    lcsb_blocks: int | None = setting(
        None, help="lcsb: blocks that get a gradient in a step; none takes half", minimum=1
    )


OPTIONS_OF: dict[str, tuple[str, ...]] = {
    "mesp": ("recompute_h", "block_inputs", "scratch_dir", "keep_blocks", "tiles", "products"),
    "mebp": ("mebp_loss", "block_inputs", "scratch_dir", "products"),
    "mezo": ("zo_eps", "zo_directions", "tiles", "products"),
    "lcsb": ("lcsb_blocks", "tiles", "products"),
    "autograd": (),
}
"""Which options each method reads."""


def check_options(method: str, options: MethodOptions) -> None:
    """Refuse an option that the method would ignore.

    Args:
        method: its name.
        options: or settings that inherit them.

    Raises:
        ConfigError: names each option and the methods that have it.
    """
    problems = []
    for option in fields(MethodOptions):
        changed = getattr(options, option.name) != option.default
        if changed and option.name not in OPTIONS_OF[method]:
            owners = " and ".join(name for name, own in OPTIONS_OF.items() if option.name in own)
            problems.append(f"{flag(option.name)} belongs to {owners}, not to {method}")
    if options.scratch_dir is not None and options.block_inputs != "file":
        problems.append("--scratch-dir is for --block-inputs file, which is not given")
    if problems:
        raise ConfigError(f"the settings cannot be used:\n{listed(problems)}")
