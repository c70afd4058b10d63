"""GGUF files: their headers, the parts of a split model, and the weights in them.

What the metadata and the names of tensors mean is for `lowtide.model.gguf`.
"""
