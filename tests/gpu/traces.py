"""Traces of a training step on each rank, for test_overlap.py.

Imports nothing that sets the device, as cases.py.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch.profiler import ProfilerActivity, profile, supported_activities

from llama_mcore.config.schema import RunConfig
from llama_mcore.distributed.device import on_gpu, synchronize
from llama_mcore.distributed.groups import process_groups
from tests.gpu import cases


def traced(run: RunConfig) -> dict[str, Any]:
    """Trace of the second step of a run in Chrome's format: the first compiles and opens connections."""
    with process_groups(run.parallel, seed=0) as groups, cases.engine_of(run, groups) as engine:
        cases._train(engine, groups, run)
        synchronize()
        with profile(activities=supported_activities() if on_gpu() else [ProfilerActivity.CPU]) as found:
            cases._train(engine, groups, run)
            synchronize()
        with TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            found.export_chrome_trace(str(path))
            return json.loads(path.read_text())
