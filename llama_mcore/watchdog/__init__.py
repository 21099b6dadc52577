"""The watchdog: a supervisor process without torch beside each training process.

`supervisor.py` starts the training process, passes stop requests on and ends what hangs; `heartbeat.py` is
the line between the two and the timeouts that it is held to, `stall_report.py` what is written about a stall.
`liveness.py` lets the launcher watch the supervisors in turn, `signals.py` notes a request to stop. Nothing
here loads torch. May import `observe` (phases and attempts) and `distributed/launch_env.py`. Begin with
supervisor.py.
"""
