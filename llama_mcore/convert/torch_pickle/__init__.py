"""Files of torch.save without trust: `sandbox.py` reads them in a process of its own, `client.py` asks it,
`writer.py` writes them. Nothing else of the package may unpickle."""
