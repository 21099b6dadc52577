"""Measurements with stated bars: `python tools/benchmark.py NAME`. One file a benchmark."""
