"""Starting a run: our torchrun, which keeps signals and exit codes, and job scripts for Slurm.

`torchrun.py` starts a node's ranks and ends all nodes where one fails, `slurm.py` writes the script of a job
after the checks of a dry run. May import `watchdog`, the rendezvous of `distributed`, and for
slurm.py `config`, `diagnose/checks_run.py` and `train/ds_config.py`. Begin with torchrun.py.
"""
