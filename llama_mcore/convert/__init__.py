"""Checkpoints converted from one format to another, as a stream and verified.

    1. convert.py               the command: checks, writes to a temporary folder, verifies, renames
    2. registry.py              the format of a folder; each in formats/ offers the same, in this order:
                                `found_in`, `open_folder`, a class of `Weights`, `write`
    3. model_weights.py         `Weights`: full tensors by canonical names, the form that all formats meet in
    4. fused_weights.py         names and arrangement of the parts of a parameter in another format
    5. verify.py, diagnose.py   the output against the source; any two checkpoints

Pickles are read by torch_pickle/, in a separate process. May import `checkpoint`, `model`,
`data/tokenizer.py`, `data`, `config` and `distributed`. Begin with registry.py and formats/native.py.
"""

import os

# Pages of 2 MB for tensors, where Linux has them (madvise): the first touch of memory in pages of 4 KB takes
# ten times as long as copying to it. torch reads this once, before its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
