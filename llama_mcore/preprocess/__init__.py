"""Text to tokens: documents in files become indexed datasets, on all cores, resumably.

`preprocess.py` starts the workers of `pool.py` and hands over to `pipeline.py`; `readers/` takes documents
out of files, `encoders/` turns them into tokens, `worker.py` does both for a piece of the input,
`part_store.py` keeps what is done, and `concatenate.py` makes one dataset of it. May import `data` for the
formats of its output and its tokenizer; nothing of training. Begin with pipeline.py.
"""
