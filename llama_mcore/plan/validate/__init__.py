"""`plan validate`: the predictions against published runs. published.py lists them, compare.py compares."""
