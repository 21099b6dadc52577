"""What tests/model/worker.py computes on every rank of a tensor-parallel job."""
