"""Worker: train several runs one after the other, without interruption.

    torchrun --nproc-per-node 2 tests/train/uninterrupted.py CASES.json

CASES.json: [{"overrides": [...], "port": free TCP port}, ...]
"""

import json
import os
import sys
from pathlib import Path

from llama_mcore.config import load_run
from llama_mcore.train.loop import train
from llama_mcore.train.signals import StopRequest

# A store of its own for each run: torchrun's still holds the addresses of the one before.
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
for case in json.loads(Path(sys.argv[1]).read_text()):
    os.environ["MASTER_PORT"] = str(case["port"])
    assert train(load_run("tiny", case["overrides"]), StopRequest()) == 0
