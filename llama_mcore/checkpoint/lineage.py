"""Whose the folder of a run is, and what that run began from: RUN_DIR/run.json.

Written when a run begins, before its first step; from then on the run id in it says which checkpoints are the
run's. Loads no torch.
"""

import hashlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from llama_mcore.checkpoint.durable_io import replace_hint, sync_folder
from llama_mcore.checkpoint.manifest import LARGEST_MANIFEST, MANIFEST, read_manifest
from llama_mcore.checkpoint.train_state import Origin
from llama_mcore.config.section import Section
from llama_mcore.errors import CheckpointError, Problem, shown
from llama_mcore.small_file import read_json, read_small_file

RUN_FILE = "run.json"


class Lineage(Section):
    run_id: str
    """Drawn when the run began."""
    began: str
    """When that was, or when checkpoints without this file were taken for a run; ISO 8601, UTC."""
    began_from: Origin | None = None
    """None: from weights that were drawn."""
    adopted: bool = False
    """Checkpoints without this file were taken for a run, whose steps before may be told of elsewhere."""


def new_lineage(
    run_id: str | None = None, began_from: Origin | None = None, *, adopted: bool = False
) -> Lineage:
    """Lineage of a run that begins now; its id is drawn where none is given."""
    began = datetime.now(UTC).isoformat(timespec="seconds")
    run_id = uuid4().hex if run_id is None else run_id
    return Lineage(run_id=run_id, began=began, began_from=began_from, adopted=adopted)


def read_lineage(run_dir: Path) -> Lineage | None:
    """Content of run.json; None where there is none. Raises CheckpointError if it cannot be read."""
    path = run_dir / RUN_FILE
    try:
        return Lineage.model_validate(read_json(path, LARGEST_MANIFEST))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or shown(" ".join(str(error).split()))
        remedy = (
            "restore it, or remove it: the checkpoints there then say which run it is; a run without any "
            "starts from scratch, and needs --init-from again if it was begun so"
        )
        raise CheckpointError(Problem(RUN_FILE, path, f"cannot be read ({reason})", remedy)) from None


def write_lineage(run_dir: Path, lineage: Lineage) -> None:
    """Replace run.json in one move, on the disk before this returns. Raises OSError."""
    replace_hint(run_dir / RUN_FILE, json.dumps(lineage.model_dump(), indent=2) + "\n")
    sync_folder(run_dir)


def origin_of(folder: Path) -> Origin:
    """The checkpoint in `folder`, to begin from. Raises CheckpointError where its manifest cannot be read."""
    manifest = read_manifest(folder)
    content = read_small_file(folder / MANIFEST, LARGEST_MANIFEST)
    return Origin(
        path=os.fsencode(folder.resolve()).decode(errors="backslashreplace"),
        run_id=manifest.run_id,
        step=manifest.step,
        manifest_sha256=hashlib.sha256(content).hexdigest(),
    )
