"""Files of torch.save from untrusted sources: `sandbox.py` reads them in a separate process, `client.py`
talks to it, `writer.py` writes them. Nothing else in the package may unpickle."""
