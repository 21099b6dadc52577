"""Preprocessing job, from input files to datasets.

    files -> groups -> units -> parts -> datasets

    group   what one reader reads in order: a file, or neighbouring text files (inputs.py)
    unit    a stretch of a group, 4 to 64 MB, that one worker reads, encodes and stores at a time (inputs.py)
    batch   the documents of a unit that are in memory together, about 4 MB (readers/)
    part    an encoded unit on disk, from which a killed job goes on (part_store.py)
    shard   the share of the input that one job of a job array does (work_queue.py)

Units follow from the input alone, and parts are joined in the order of the input: the datasets depend on the
input and the options, not on the workers.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

from llama_mcore import __version__
from llama_mcore.data import finished
from llama_mcore.data.index import bin_path
from llama_mcore.data.indexed_dataset import optimal_dtype
from llama_mcore.data.manifest import TOKENIZER_MODEL
from llama_mcore.data.tokenizer import Tokenizer
from llama_mcore.errors import DataError, LlamaMcoreError, Problem, gathering, raise_all
from llama_mcore.files import prepare_output
from llama_mcore.preprocess.concatenate import join_parts, remove_dataset, remove_leftovers, write_quarantine
from llama_mcore.preprocess.inputs import InputFile, Unit, find_inputs, group_files, unit_bytes_for
from llama_mcore.preprocess.options import EncodeSpec, Outputs, Settings, check_settings, parse_shard
from llama_mcore.preprocess.part_store import (
    PLAN,
    Lock,
    PartRecord,
    PartsFolder,
    is_begun,
    open_parts,
    remove,
    remove_if_unused,
)
from llama_mcore.preprocess.pool import Workers
from llama_mcore.preprocess.summary import Totals, describe
from llama_mcore.preprocess.work_queue import Shard, WorkQueue
from llama_mcore.progress import ByteProgress

_FORMAT = 1
"""Version of the parts and of the rules that make them."""
_ENOUGH_TO_JUDGE = 1000
"""Documents after which too many bad ones end a job at once."""


class Pipeline:
    """A job of preprocessing: check everything, encode units into parts, join the parts into datasets.

    Raises one error with everything that can be known before work begins: ConfigError, MissingInputError,
    DataError or OutputError, as `errors.raise_all` has it.
    """

    def __init__(
        self,
        inputs: Sequence[Path | str],
        tokenizer_model: Path,
        output_prefix: Path,
        settings: Settings,
        workers: Workers[Unit, tuple[PartRecord, str | None]],
    ) -> None:
        self._settings, self._workers = settings, workers
        self._files: list[InputFile] = []
        self._shard = Shard()
        errors: list[LlamaMcoreError] = []
        with gathering(errors):
            self._files = find_inputs(inputs)
        with gathering(errors):
            self._shard = parse_shard(settings.shard)
        with gathering(errors):
            check_settings(settings, self._shard, self._files)
        with gathering(errors):
            self._tokenizer = Tokenizer(tokenizer_model, "--tokenizer-model")
        self._outputs = Outputs(output_prefix, settings, self._shard)
        with gathering(errors):
            for path in self._outputs.files:
                prepare_output(path, "--output-prefix")
        raise_all(errors)
        self._dtype = optimal_dtype(self._tokenizer.vocab_size)
        self._unit_bytes = unit_bytes_for(self._files)
        self._groups = group_files(self._files, self._unit_bytes)

    def run(self) -> None:
        folder = self._outputs.parts_folder
        with Lock(folder):
            try:
                if self._is_finished():
                    remove_if_unused(folder)
                    return
                for path in self._outputs.files:
                    remove_leftovers(path)
                # What was read of a stream is gone: a killed job cannot go on.
                restart = self._settings.restart or self._reads_a_stream
                self._make_datasets(open_parts(folder, self._plan(), restart=restart))
            except BaseException:
                remove_if_unused(folder)
                raise
            remove(folder)

    def _make_datasets(self, parts: PartsFolder) -> None:
        spec = self._encode_spec(parts)
        done = parts.done()
        if self._settings.on_bad_line == "fail":
            done = {unit: record for unit, record in done.items() if not record.skipped}
        queue = WorkQueue(self._groups, self._unit_bytes, self._shard, done)
        speed = self._encode(spec, queue)
        units = list(queue.in_order())
        totals = self._totals(record for _, record in units)
        self._refuse_bad(spec, queue, totals.skipped, totals.documents)
        self._refuse_empty(totals)
        self._join(spec, units, totals)
        write_quarantine(spec, units, self._outputs.quarantine)
        print(describe(self._outputs.datasets, self._dtype, totals, units, self._groups), flush=True)
        print(f"  {speed}", flush=True)

    def _encode(self, spec: EncodeSpec, queue: WorkQueue) -> str:
        """Encode all units that are not done; return how fast that was."""
        records = queue.done.values()
        skipped = sum(record.skipped for record in records)
        documents = sum(record.documents for record in records)
        before = sum(record.input_bytes for record in records)
        if before:
            _say(f"going on after {len(records):,} parts ({before / 1e6:,.1f} MB) that are done")
        make, noted = partial(_unit_encoder, spec), False
        with ByteProgress("preprocess-data", self._bytes_to_read, done=before) as progress:
            for unit, (record, note) in self._workers.run(make, queue.next_unit, self._describe_unit):
                if note and not noted:
                    _say(f"encoding with sentencepiece, because {note}")
                    noted = True
                queue.finish(unit, record)
                skipped, documents = skipped + record.skipped, documents + record.documents
                if documents >= _ENOUGH_TO_JUDGE:
                    self._refuse_bad(spec, queue, skipped, documents)
                tokens = sum(output.tokens for output in record.outputs)
                progress.advance(record.input_bytes, record.documents, tokens)
        return progress.speed

    def _join(self, spec: EncodeSpec, units: Sequence[tuple[Unit, PartRecord]], totals: Totals) -> None:
        """Write the datasets that have documents; delete older ones in place of the others."""
        prefixes = self._outputs.datasets
        written = [bool(output.documents) for output in totals.outputs]
        join_parts(
            spec,
            units,
            {
                index: (prefix, self._known(index, totals, units))
                for index, prefix in enumerate(prefixes)
                if written[index]
            },
        )
        empty = [prefix for prefix, some in zip(prefixes, written, strict=True) if not some]
        for prefix in [*empty, *self._outputs.unused]:
            remove_dataset(prefix)

    def _is_finished(self) -> bool:
        """True, and printed, if the job was done before. OutputError for datasets of another job."""
        if self._settings.force:
            return False
        options = {**self._options(), "on_bad_line": self._settings.on_bad_line}
        job = finished.JobIdentity(self._job_sha256(), options, self._tokenizer.sha256)
        outputs = self._outputs
        begun = is_begun(outputs.parts_folder, self._plan())
        if not finished.is_finished(outputs.datasets, job, unused=outputs.unused, begun=begun):
            self._check_quarantine()
            return False
        for prefix in outputs.datasets:
            print(f"{prefix}.bin and .idx: already there, nothing to do", flush=True)
        return True

    def _check_quarantine(self) -> None:
        """Raise OutputError for a list of bad lines that another job has written."""
        # A job with other keys has other datasets, but the same list. Where parts are, open_parts compares.
        outputs = self._outputs
        ours = [outputs.parts_folder / PLAN, *map(bin_path, outputs.datasets)]
        if outputs.quarantine.exists() and not any(path.exists() for path in ours):
            raise finished.cannot_replace("--output-prefix", outputs.quarantine, "written by another job")

    def _encode_spec(self, parts: PartsFolder) -> EncodeSpec:
        settings, tokenizer = self._settings, self._tokenizer
        return EncodeSpec(
            groups=self._groups,
            unit_bytes=self._unit_bytes,
            parts=parts,
            tokenizer_model=tokenizer.path,
            encoder=settings.encoder,
            keys=settings.keys,
            vocab_size=tokenizer.vocab_size,
            dtype=self._dtype,
            bos=tokenizer.bos if settings.append_bos else None,
            eod=tokenizer.eod if settings.append_eod else None,
            validation_split=settings.validation_split,
            on_bad_line=settings.on_bad_line,
            shuffle_seed=settings.shuffle_seed,
        )

    def _plan(self) -> dict[str, str]:
        """All that the parts depend on. Encoder and workers are not in it: they change nothing."""
        files = {f"input {index}": file.identity for index, file in enumerate(self._files)}
        plan = {"tokenizer_model": self._tokenizer.sha256, "unit_bytes": str(self._unit_bytes)}
        return {"format": str(_FORMAT), **plan, **self._options(), **files}

    def _job_sha256(self) -> str | None:
        if self._reads_a_stream:
            return None
        return finished.job_sha256({**self._plan(), "on_bad_line": self._settings.on_bad_line})

    def _options(self) -> dict[str, str]:
        settings = self._settings
        return {
            "json_keys": " ".join(settings.keys),
            "append_bos": str(settings.append_bos),
            "append_eod": str(settings.append_eod),
            "validation_split": str(settings.validation_split),
            "shuffle_seed": str(settings.shuffle_seed),
            "shard": f"{self._shard.index}/{self._shard.count}",
        }

    def _known(
        self, index: int, totals: Totals, units: Sequence[tuple[Unit, PartRecord]]
    ) -> dict[str, object]:
        """Fields of the manifest of an output that do not follow from its tokens."""
        settings = self._settings
        key, split = divmod(index, len(self._outputs.datasets) // len(settings.keys))
        read = {file for unit, _ in units for file in self._groups[unit.group].files}
        return {
            "tokenizer_sha256": self._tokenizer.sha256,
            "vocab_size": self._tokenizer.vocab_size,
            "text_bytes": totals.outputs[index].text_bytes,
            "empty_documents": totals.empty[key],
            "skipped_lines": totals.skipped,
            "eod": self._tokenizer.eod if settings.append_eod else None,
            "options": {
                **self._options(),
                "on_bad_line": settings.on_bad_line,
                "json_key": settings.keys[key],
                "split": "validation" if split else "document",
                TOKENIZER_MODEL: str(self._tokenizer.path),
            },
            "job_sha256": self._job_sha256(),
            "versions": {
                "llama-mcore": __version__,
                **{name: version(name) for name in ("sentencepiece", "gigatoken")},
            },
            "inputs": [{"path": str(f.path), "bytes": f.size} for f in self._files if f in read],
        }

    def _totals(self, records: Iterable[PartRecord]) -> Totals:
        return Totals.of(records, len(self._settings.keys), len(self._outputs.datasets))

    @property
    def _bytes_to_read(self) -> int:
        return sum(file.size for file in self._files) // self._shard.count

    @property
    def _reads_a_stream(self) -> bool:
        return any(file.format == "stream" for file in self._files)

    def _describe_unit(self, unit: Unit) -> str:
        path = self._groups[unit.group].path
        return f"{path}, unit {unit.index:,} of about {self._unit_bytes / 1e6:,.0f} MB"

    def _refuse_bad(self, spec: EncodeSpec, queue: WorkQueue, skipped: int, documents: int) -> None:
        if documents and skipped / documents > self._settings.max_bad_ratio:
            quarantine = self._outputs.quarantine
            done = [(Unit(*place), record) for place, record in sorted(queue.done.items())]
            write_quarantine(spec, done, quarantine)
            reason = f"{skipped:,} of {documents:,} documents cannot be used; {quarantine} lists them"
            remedy = "fix them, or allow more with --max-bad-ratio"
            raise DataError(Problem("--max-bad-ratio", self._settings.max_bad_ratio, reason, remedy))

    def _refuse_empty(self, totals: Totals) -> None:
        """Raise DataError for keys under which there is no text at all."""
        if self._shard.count > 1:  # a shard of a small input may well have none
            return
        keys = self._settings.keys
        empty = [
            key for index, key in enumerate(keys) if not any(output.tokens for output in totals.of_key(index))
        ]
        if empty:
            remove(self._outputs.parts_folder)
            remedy = "check the input files and --json-keys"
            raise DataError(
                [Problem("--input", f"key {key!r}", "no document holds any text", remedy) for key in empty]
            )


def _unit_encoder(spec: EncodeSpec) -> Callable[[Unit], tuple[PartRecord, str | None]]:
    from llama_mcore.preprocess.worker import UnitEncoder  # slow to import, and not needed beside workers

    return UnitEncoder(spec)


def _say(text: str) -> None:
    print(f"preprocess-data: {text}", file=sys.stderr, flush=True)
