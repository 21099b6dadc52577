"""SentencePiece tokenizers: `tokenizer.py` loads any, the other modules train one.

`train.py` is the command, `corpus.py` reads the text and draws a sample of it, `memory.py` estimates what
training will need, `report.py` measures how well the result compresses. Training reads text with the readers
of `preprocess` and replaces files by the rules of `data`; `tokenizer.py` imports the root's files alone, so
that every room may use it. Begin with train.py.
"""
