"""What a training rank reads: indexed datasets, and the order in which their windows come.

The order is a function of seed and position, without state: `mixture.py` chooses the source,
`sample_order.py` the window, `windows.py` reads it, `data_plan.py` ties them together and says what has been
consumed, `loader.py` makes batches. `index.py`, `indexed_dataset.py` and `manifest.py` are the files on disk,
`tokenizer.py` the vocabulary they are written in. May import the root's files. Begin with data_plan.py.
"""
