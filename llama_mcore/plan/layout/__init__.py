"""`plan layout` and `plan memory`: which layout fits, and how fast it is.

search.py tries them all by the formulas of memory.py, footprint.py and throughput.py; hardware.py lists the
GPUs. validation.py compares the predicted speeds with those of published.py.
"""
