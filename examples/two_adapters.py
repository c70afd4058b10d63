"""Train two adapters that differ in one setting, and evaluate both beside the base model.

python examples/two_adapters.py MODEL DATA OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import lowtide as lt


def main(model: str, data: str, out: str) -> dict[str, float]:
    """Train at two ranks; returns the losses by name."""
    work = {"model": model, "data": data, "max_seq_length": 64, "mask_prompt": True}
    losses = {"base": lt.evaluate(**work).loss}
    for rank in (2, 16):
        path = str(Path(out) / f"rank-{rank}")
        lt.train(adapter_path=path, lora_r=rank, iters=20, learning_rate=2e-3, **work)
        losses[f"rank {rank}"] = lt.evaluate(adapter_path=path, **work).loss
    for name, loss in losses.items():
        print(f"{name:8} {loss:.4f}")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
