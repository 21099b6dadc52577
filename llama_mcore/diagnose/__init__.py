"""Checks before a start: the doctor's of the machine, the preflight's of a run from each of its ranks.

`doctor.py` and `preflight.py` are the commands; a `Finding` is one line of either. `software.py`,
`machine.py`, `gpus.py`, `backends.py` (which tries them by smoke.py) and `allreduce.py` check the machine,
`checks_run.py` and `checks_node.py` what a run will need there. May import what it checks: `distributed`,
`model`, `data`, `checkpoint`, `plan`, `config`, and of `train` consistency.py. Begin with doctor.py.
"""
