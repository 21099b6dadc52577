"""Looking before starting: the doctor at the machine, the preflight at a run from each of its ranks.

`doctor.py` and `preflight.py` are the commands; a `Finding` is one line of either. `software.py`,
`limits.py`, `gpus.py`, `environment.py` and `backends.py` look at the machine, `checks_run.py` and
`checks_node.py` at what a run will need there. May import what it asks: `distributed`, `model`, `data`,
`checkpoint`, `plan`, `config`, and of `train` consistency.py. Begin with doctor.py.
"""
