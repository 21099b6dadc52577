"""`plan size`: the model and the tokens that a budget pays for. solve.py answers, scaling.py has the laws."""
