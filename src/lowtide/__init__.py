"""lowtide: fine-tune language models with exact LoRA gradients in about inference memory."""

from lowtide.methods import gradients
from lowtide.model.adapter import Adapter, LoraConfig
from lowtide.model.batch import Batch
from lowtide.model.decoder import load_model

__version__ = "0.1.0"
__all__ = ["Adapter", "Batch", "LoraConfig", "gradients", "load_model"]
