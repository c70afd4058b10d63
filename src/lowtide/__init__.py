"""lowtide: fine-tune language models with exact LoRA gradients in about inference memory."""

import os

from lowtide.cores import spin_count

# Read by the OpenMP runtime when torch loads it: threads spin for a while, then sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "GOMP_SPINCOUNT" not in os.environ:
    os.environ["GOMP_SPINCOUNT"] = str(spin_count())
# Read by MKL: packing buffers of products go back to malloc instead of being kept per thread and
# per kind of product, 1 to 7 MB that nobody else could use.
os.environ.setdefault("MKL_DISABLE_FAST_MM", "1")

from lowtide.infer.answer import ask
from lowtide.infer.generate import generate, logits
from lowtide.memory.heap import fix_thresholds
from lowtide.memory.measure import mark_import
from lowtide.methods import gradients
from lowtide.model.adapter import Adapter, LoraConfig
from lowtide.model.batch import Batch
from lowtide.model.decoder import load_model
from lowtide.train.budget import plan
from lowtide.train.evaluating import evaluate
from lowtide.train.run import train

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "Batch",
    "LoraConfig",
    "ask",
    "evaluate",
    "generate",
    "gradients",
    "load_model",
    "logits",
    "plan",
    "train",
]

fix_thresholds()
mark_import()
