"""Pure forward/backward pairs of tensors. Nothing here knows a model, a file or a trainer."""
