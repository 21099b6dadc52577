"""Data of a training rank: indexed datasets, and the order in which their windows are read.

The order is a function of seed and position, without state: `mixture.py` chooses the source,
`sample_order.py` the window, `windows.py` reads it, `data_plan.py` ties them together and counts what has
been consumed, `loader.py` makes batches. `index.py`, `indexed_dataset.py` and `manifest.py` are the files on
disk, `tokenizer.py` the vocabulary that they are written in. May import the root's files and the section base
of `config`. Begin with data_plan.py.
"""
