"""`llama-mcore inspect-checkpoint`: the content of checkpoints, their damage, their differences."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llama_mcore.checkpoint.diff import Comparison, TensorDifference, compare
from llama_mcore.checkpoint.manifest import Manifest, damaged_files, missing_files, read_manifest
from llama_mcore.checkpoint.paths import MANIFEST, TEMPORARY, step_folders, unfinished, unreadable
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.checkpoint.run_dir import find_checkpoint
from llama_mcore.data.data_plan import format_table
from llama_mcore.errors import CheckpointError, MissingInputError, Problem, input_problem, shown
from llama_mcore.model.parameters import pattern_of
from llama_mcore.progress import ByteProgress

_SHOWN_FILES = 20


@dataclass(frozen=True)
class Inspection:
    """One checkpoint, as far as it can be read."""

    path: str
    state: str
    """complete, damaged, or unfinished, if an interrupted save or removal left it."""
    verified: bool
    """True if every byte was read."""
    manifest: Manifest | None
    tokens: int | None
    """Tokens consumed since the start of the run."""
    parameters: int | None
    bytes: int
    """Total bytes of its files."""
    extra_files: list[str]
    """Files in the folder that are not part of the checkpoint; nothing reads them."""
    problems: list[str]


def inspect_checkpoint(path: Path, *, verify: bool = False, as_json: bool = False) -> None:
    """Print a checkpoint, or all of a run; with `verify` read every byte. Raises CheckpointError with all
    damage after printing, MissingInputError where `path` is neither a checkpoint nor a run with one."""
    folders, is_run = _folders(path)
    total = sum(_size(folder) for folder in folders if verify and folder.suffix != TEMPORARY)
    with ByteProgress("verify", total) as progress:
        advance = progress.advance if verify else None
        found = [_inspect(folder, advance) for folder in folders]
    inspections = [inspection for inspection, _ in found]
    if as_json:
        entries = [_to_json(inspection) for inspection in inspections]
        print(json.dumps(entries if is_run else entries[0], indent=2))
    else:
        print("\n".join(_table(inspections) if is_run else _as_text(inspections[0])))
    if problems := [problem for _, each in found for problem in each]:
        raise CheckpointError(problems)


def diff_checkpoints(left: Path, right: Path, *, verify: bool = False, as_json: bool = False) -> bool:
    """Print how two checkpoints, or the newest ones of two runs, differ; True if they are the same."""
    one, other = (CheckpointReader(find_checkpoint(path)) for path in (left, right))
    if verify:
        one.check_content()
        other.check_content()
    with ByteProgress("compare", _size(one.path)) as progress:
        comparison = compare(one, other, progress.advance)
    print(json.dumps(asdict(comparison), indent=2) if as_json else "\n".join(_differences(comparison)))
    return comparison.same


def _folders(path: Path) -> tuple[list[Path], bool]:
    """Folders of the checkpoints to inspect, and whether `path` is the folder of a run."""
    remedy = "give RUN_DIR or RUN_DIR/checkpoints/step-*"
    try:
        if path.is_dir() and (path.name.startswith("step-") or (path / MANIFEST).exists()):
            return [path], False
        if not path.exists():
            raise MissingInputError(input_problem("folder", path, remedy))
        found = [*step_folders(path), *sorted(unfinished(path))]
    except OSError as error:
        raise unreadable(error) from None
    if not found:
        reason = "is neither a checkpoint nor the folder of a run that has one"
        raise MissingInputError(Problem("folder", path, reason, remedy))
    return found, True


def _inspect(folder: Path, advance: Callable[[int], None] | None) -> tuple[Inspection, list[Problem]]:
    """`advance`: called with the number of bytes that were hashed; None: hash nothing."""
    manifest, model, problems = None, None, []
    leftover = folder.suffix == TEMPORARY
    try:
        manifest = read_manifest(folder)
        problems = missing_files(folder, manifest)
        if advance and not leftover:
            unusable = {problem.value for problem in problems}
            usable = tuple(file for file in manifest.files if folder / file.name not in unusable)
            problems += damaged_files(folder, usable, advance)
        if not problems:
            model = CheckpointReader(folder).model
    except CheckpointError as error:
        problems += error.problems
    known = {MANIFEST, *(file.name for file in manifest.files)} if manifest else set()
    inspection = Inspection(
        path=str(folder),
        state="unfinished" if leftover else "damaged" if problems else "complete",
        verified=bool(advance and not leftover),
        manifest=manifest,
        tokens=manifest.consumed_samples * model.seq_length if manifest and model else None,
        parameters=model.num_params() if model else None,
        bytes=_size(folder),
        extra_files=sorted(path.name for path in _entries(folder) if known and path.name not in known),
        problems=[str(problem) for problem in problems],
    )
    return inspection, [] if leftover else problems


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _size(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.lstat().st_size for path in _entries(folder) if path.is_file())


def _to_json(inspection: Inspection) -> dict[str, Any]:
    manifest = inspection.manifest
    return vars(inspection) | {"manifest": manifest.model_dump(mode="json") if manifest else None}


def _table(found: list[Inspection]) -> Iterator[str]:
    """Table of a run's checkpoints."""
    rows = [("checkpoint", "step", "tokens", "bytes", "layout", "state")]
    for each in found:
        manifest = each.manifest
        rows.append(
            (
                shown(Path(each.path).name),
                _number(manifest.step if manifest else None),
                _number(each.tokens),
                f"{each.bytes:,}",
                str(manifest.layout) if manifest else "?",
                _state(each),
            )
        )
    yield format_table(rows)


def _state(found: Inspection) -> str:
    if found.state == "damaged":
        return "DAMAGED"
    return f"{found.state}, every byte read" if found.verified else found.state


def _number(found: int | None) -> str:
    return "?" if found is None else f"{found:,}"


def _as_text(found: Inspection) -> Iterator[str]:
    lines = {"checkpoint": shown(found.path), "state": _state(found)}
    if not found.verified:
        lines["state"] += "; --verify reads every byte"
    if found.manifest:
        lines |= _facts(found.manifest, found)
    lines["size"] = f"{found.bytes:,} bytes"
    if found.extra_files:
        lines["other files"] = _listed(found.extra_files)
    yield from (f"{name:<12}{value}" for name, value in lines.items())
    if found.manifest:
        yield f"\n{_sources(found.manifest)}"
        yield f"\n{_files(found.manifest)}"


def _facts(manifest: Manifest, found: Inspection) -> dict[str, str]:
    tokenizers = {segment.tokenizer_sha256 or "unknown" for segment in manifest.segments}
    return {
        "run": shown(manifest.run_id),
        "step": f"{manifest.step:,}, learning rate {manifest.lr:g}",
        "tokens": f"{_number(found.tokens)} in {manifest.consumed_samples:,} samples",
        "parameters": _number(found.parameters),
        "layout": str(manifest.layout),
        "tokenizer": f"SHA-256 {shown(', '.join(sorted(tokenizers)))}",
    }


def _sources(manifest: Manifest) -> str:
    """Table of the windows read of each source, beside the data plan."""
    plans = {source.name: source for segment in manifest.segments for source in segment.sources}
    rows = [("source", "windows read", "of", "at most", "content")]
    for name, read in manifest.windows_read.items():
        plan = plans.get(name)
        rest = (f"{plan.num_windows:,}", f"{plan.cap:,}", shown(plan.content_id)) if plan else ("?", "?", "?")
        rows.append((shown(name), f"{read:,}", *rest))
    return format_table(rows)


def _files(manifest: Manifest) -> str:
    rows = [("file", "bytes", "tensor-parallel rank", "SHA-256")]
    for file in manifest.files[:_SHOWN_FILES]:
        rows.append((file.name, f"{file.bytes:,}", str(file.tp_rank), file.sha256))
    left = len(manifest.files) - _SHOWN_FILES
    return format_table(rows) + (f"\nand {left:,} more" if left > 0 else "")


def _listed(names: list[str]) -> str:
    left = len(names) - _SHOWN_FILES
    return ", ".join(map(shown, names[:_SHOWN_FILES])) + (f" and {left:,} more" if left > 0 else "")


def _summed(group: list[TensorDifference]) -> tuple[str, ...]:
    """Row of a table for one parameter of all layers."""
    elements, numel = (sum(getattr(each, field) for each in group) for field in ("elements", "numel"))
    largest = [each.largest for each in group if each.largest is not None]
    is_finite = len(largest) == len(group)
    return (
        f"{len(group):,}",
        f"{elements:,}",
        f"{numel:,}",
        f"{max(largest):.2e}" if is_finite else "not finite",
    )


def _differences(found: Comparison) -> Iterator[str]:
    yield from (shown(field, 1000) for field in found.fields)
    yield from found.only_in_one
    if found.tensors:
        groups: dict[str, list[TensorDifference]] = {}
        for each in found.tensors:
            groups.setdefault(f"{each.kind} of {pattern_of(each.parameter)[0]}", []).append(each)
        rows = [("tensor", "number", "differing", "of", "largest relative difference")]
        yield format_table(rows + [(name, *_summed(group)) for name, group in groups.items()])
    yield f"{len(found.tensors):,} of {found.compared:,} tensors differ, {len(found.fields):,} fields do"
