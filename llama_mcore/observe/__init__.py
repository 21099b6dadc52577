"""What a run tells: log lines, metrics, TensorBoard, and where its time went.

`metrics.py` describes a step, `sinks.py` writes it, `report.py` reads it back as a picture. `phases.py` is
how a rank says what it is doing, to the watchdog as well; `goodput/` accounts for every second of all
attempts. May import the root's files; `mfu.py` alone also takes peaks and FLOPs from `plan`. Begin with
sinks.py.
"""
