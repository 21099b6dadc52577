"""Who watches a rank: a supervisor process without torch, beside each process that trains.

`supervisor.py` starts the process, passes on requests to stop, and ends what hangs; `heartbeat.py` is the
line between the two, `timeouts.py` how long it waits for which phase, `stall_report.py` what it writes about
a stall. `signs.py` and `workers.py` let the launcher watch the supervisors, `signals.py` is a request to
stop. Nothing here loads torch. May import `observe` (phases and attempts) and `distributed/launch_env.py`.
Begin with supervisor.py.
"""
