"""Checkpoints: saved by every rank, published at once or not at all, read back on any layout.

    parameter   1. optimizer_shards.py   the fragments of each parameter that this rank owns under ZeRO
                2. snapshot.py           copies them to host memory, while training goes on
    file        3. safetensors_io.py     writes a file per rank, under the keys of paths.py
                4. saver.py              gathers the hashes, writes manifest.json (manifest.py), renames
    back        5. reader.py             opens a folder and reads any stretch of any parameter
                6. loader.py             fills the fragments of a rank, whatever layout wrote them

A run's folder: run_dir.py says whose it is, run_lock.py keeps other jobs out, start.py decides what a start
goes on from. Nothing is unpickled. May import `model`, `data`, `observe`, `distributed` and `config`. Begin
with paths.py and manifest.py.
"""
