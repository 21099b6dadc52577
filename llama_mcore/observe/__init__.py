"""Observation of a run: log lines, metrics, TensorBoard, profiles, and where its time went.

`metrics.py` describes a step, `sinks.py` writes it, `loss_curve.py` draws what was written, `profile.py`
traces chosen steps. By `phases.py` a rank says what it is doing, to the watchdog as well; `goodput/` accounts
for every second of all attempts. May import the root's files, `distributed/device.py` and the section base of
`config`. Begin with sinks.py.
"""
