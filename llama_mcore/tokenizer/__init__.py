"""Training of SentencePiece tokenizers; `data/tokenizer.py` loads one.

`train.py` is the command, `corpus.py` draws its sample through `sampling.py`, `memory.py` says beforehand
what training will need, `report.py` how well the result compresses. Training reads text with the readers of
`preprocess` and replaces files by the rules of `data`. Begin with train.py.
"""
