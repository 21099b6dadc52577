"""Plans on paper, before a GPU is taken: what to train, on which layout, whether it fits, how long it takes.

`size/` answers which model on how many tokens, `layout/` which parallel layout of it is fastest and fits,
`data.py` how the mixture fills the budget; `dry_run.py` prints a run for `train --dry-run`. Imports no torch.
May import `config` and the sections of other packages. Begin with size/solve.py and layout/search.py.
"""
