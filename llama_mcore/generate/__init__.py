"""Text from a checkpoint: `generate.py` is the command, `decoder.py` the model with a key-value cache.

It is made to look at a model, not for serving: one prompt, one process. May import `convert`, for
checkpoints of any format, `model`, `data/tokenizer.py` and `distributed/device.py`. Begin with
generate.py.
"""
