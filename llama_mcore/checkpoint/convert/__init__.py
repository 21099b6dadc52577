"""Checkpoints from one format to another."""

import os

# Tensors in pages of 2 MB, where Linux has them (madvise): to touch fresh memory in pages of 4 KB takes ten
# times what copying to it does. torch asks once, before its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
