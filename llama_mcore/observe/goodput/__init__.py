"""Goodput: where the time of a run went, over all its attempts.

`timeline.py` and `attempts.py` write RUN_DIR/timeline.jsonl and attempts.jsonl, `spans.py` reads both and
accounts for every second, `report.py` shows it. `attempts.py` also refuses one more attempt of a run that
makes no progress.
"""
