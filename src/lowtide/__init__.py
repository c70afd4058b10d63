"""lowtide: fine-tune language models with exact LoRA gradients in about inference memory."""

import os

# Read by the OpenMP runtime when torch loads it. Waiting threads that spin would burn CPU time that
# other programs on the machine could use, and beside another busy process they slow a step down
# several times.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from lowtide.infer.generate import generate, logits
from lowtide.memory.measure import mark_import
from lowtide.methods import gradients
from lowtide.model.adapter import Adapter, LoraConfig
from lowtide.model.batch import Batch
from lowtide.model.decoder import load_model
from lowtide.train.run import train

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "Batch",
    "LoraConfig",
    "generate",
    "gradients",
    "load_model",
    "logits",
    "train",
]

mark_import()
