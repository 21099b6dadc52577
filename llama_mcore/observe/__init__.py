"""Observation of a run: log lines, metrics, TensorBoard, and where its time went.

`metrics.py` describes a step, `sinks.py` writes it, `loss_curve.py` draws what was written. By `phases.py` a
rank says what it is doing, to the watchdog as well; `goodput/` accounts for every second of all attempts. May
import the root's files and the section base of `config`. Begin with sinks.py.
"""
