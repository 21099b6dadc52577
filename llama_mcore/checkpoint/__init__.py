"""Checkpoints: saved by every rank, published at once or not at all, read back on any layout.

`saver.py` copies (`snapshot.py`), writes in the background and publishes; `manifest.py` is the record that
makes a folder a checkpoint; `reader.py` gives any stretch of any tensor, `loader.py` fills an engine with
them. `run_lock.py` keeps other runs out of a run's folder, `start.py` says what a start would go on from.
Nothing is unpickled. May import `model`, `data`, `observe`, `distributed` and `config`. Begin with
manifest.py, then saver.py and reader.py.
"""
