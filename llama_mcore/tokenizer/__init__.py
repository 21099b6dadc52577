"""Training of SentencePiece tokenizers; `data/tokenizer.py` loads one.

`train.py` is the command, `corpus.py` reads the text and draws a sample of it, `memory.py` estimates what
training will need, `report.py` measures how well the result compresses. Training reads text with the readers
of `preprocess` and replaces files by the rules of `data`, and imports nothing else. Begin with train.py.
"""
