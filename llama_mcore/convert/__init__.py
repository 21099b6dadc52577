"""Checkpoints from one format to another, as a stream and verified.

`convert.py` is the command. `registry.py` says what a format offers, each lies in `formats/`; `verify.py`
compares what was written with what was read, `diagnose.py` looks for what a wrong conversion did. Pickles are
read by `torch_pickle/`, in a process of its own. May import `checkpoint`, `model`, `tokenizer/tokenizer.py`,
`data`, `config` and `distributed`. Begin with registry.py, then formats/native.py.
"""

import os

# Tensors in pages of 2 MB, where Linux has them (madvise): to touch fresh memory in pages of 4 KB takes ten
# times what copying to it does. torch asks once, before its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
