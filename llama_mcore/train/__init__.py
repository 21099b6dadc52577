"""Training: a run from its first batch to its last checkpoint.

`trainer.py` is the loop, `setup.py` opens what it is made of, `step.py` is one step, `engine.py` and
`zero.py` are the border to DeepSpeed. `health.py` decides by numbers alone what to do about a bad step,
`rollback.py` does it; `resume.py` finds the checkpoint to continue from. May import `model`, `data`,
`checkpoint`, `observe`, `distributed`, `config`, and the request to stop in `watchdog`. Begin with
trainer.py.
"""
