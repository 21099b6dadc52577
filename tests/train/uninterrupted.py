"""Worker: train several runs on two ranks, one after the other and without interruption.

    python tests/train/uninterrupted.py CASES.json

CASES.json: a list of overrides for each run.
"""

import json
import sys
from pathlib import Path

from llama_mcore.config import load_run
from llama_mcore.observe.log import silence_libraries

silence_libraries(cpu=True)

from llama_mcore.train.loop import train  # noqa: E402
from llama_mcore.train.signals import StopRequest  # noqa: E402
from tests.forked import run_ranks  # noqa: E402

for overrides in json.loads(Path(sys.argv[1]).read_text()):
    run = load_run("tiny", overrides)
    run_ranks(2, lambda run=run: sys.exit(train(run, StopRequest())))
