"""What a GGUF file says about a model, in both directions: its metadata and its tensors' names.

`entry.py` is what a family says of itself, `read.py` makes a config.json of metadata, `tensors.py`
names the tensors and the order of their rows, `write.py` makes metadata of a model. `home.py` opens
a file as a model, `unpack.py` is the child process that writes what the file says into the cache.
"""
