"""Measurements with stated bars: `llama-mcore benchmark NAME`, a file for each.

`runner.py` times contenders in turns and judges ratios, `models.py` builds what they work on; gpu_report.py
is what `make gpu` runs and writes. docs/benchmarks.md has results. May import every package but `cli`. Begin
with runner.py, then step.py.
"""
