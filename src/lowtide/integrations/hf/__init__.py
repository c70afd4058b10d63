"""lowtide inside `transformers`: a causal LM with PEFT's LoRA trains in lowtide's memory.

    handle = patch(peft_model)      # then Trainer, SFTTrainer or accelerate, as ever
    handle.unpatch()                # or `with patch(peft_model): ...`

A call with labels runs the embedding module, then lowtide's blocks, one `autograd.Function` each
that keeps the block's input, and its loss of one sweep over the vocabulary. A call without labels
in training mode runs the same blocks and the model's own head. All other calls, generation among
them, run what they ran before. Needs transformers and peft, which it does not import by itself.
"""

from .patched import Patch, patch, unpatch

__all__ = ["Patch", "patch", "unpatch"]
