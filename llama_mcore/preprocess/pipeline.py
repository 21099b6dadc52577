"""A preprocessing job from its settings to the datasets: what `preprocess` does once workers are starting.

The input is cut into units (inputs.py). Workers encode them (worker.py) into parts (part_store.py), which
are joined in the order of the input (concatenate.py): the output depends on the input and the options alone,
and a job that was killed goes on with the parts that are there.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

from llama_mcore import __version__
from llama_mcore.data import finished
from llama_mcore.data.index import bin_path, idx_path
from llama_mcore.data.indexed_dataset import optimal_dtype
from llama_mcore.data.manifest import TOKENIZER_MODEL, manifest_path
from llama_mcore.data.tokenizer import Tokenizer
from llama_mcore.errors import DataError, LlamaMcoreError, Problem, gathering, raise_all
from llama_mcore.files import prepare_output
from llama_mcore.preprocess.concatenate import join_parts, remove_dataset, remove_leftovers, write_quarantine
from llama_mcore.preprocess.inputs import InputFile, Unit, find_inputs, sources_of, unit_bytes_for
from llama_mcore.preprocess.job import Job
from llama_mcore.preprocess.options import (
    Settings,
    check_settings,
    output_prefixes,
    parse_shard,
    shard_prefix,
)
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
from llama_mcore.preprocess.work_queue import WHOLE, Schedule
from llama_mcore.progress import InputProgress

ENCODERS = ("sentencepiece", "gigatoken")
_FORMAT = 1
"""Of the parts and of the rules that make them."""
_ENOUGH_TO_JUDGE = 1000
"""Documents after which too many bad ones end a job at once."""


class Preprocessing:
    """One job. `workers` have been started and know nothing yet.

    Raises one error with all that can be known before work begins: ConfigError, MissingInputError, DataError,
    OutputError, as `errors.raise_all` has it.
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
        self._keys = list(dict.fromkeys(settings.json_keys))
        self._files: list[InputFile] = []
        self._shard = WHOLE
        errors: list[LlamaMcoreError] = []
        with gathering(errors):
            self._files = find_inputs(inputs)
        with gathering(errors):
            self._shard = parse_shard(settings.shard)
        with gathering(errors):
            check_settings(settings, self._shard, self._files)
        with gathering(errors):
            self._tokenizer = Tokenizer(tokenizer_model, "--tokenizer-model")
        prefix = shard_prefix(output_prefix, self._shard)
        self._folder = Path(f"{prefix}.parts")
        self._quarantine = Path(f"{prefix}.quarantine.jsonl")
        self._outputs = output_prefixes(prefix, self._keys, bool(settings.validation_split))
        both = output_prefixes(prefix, self._keys, validation=True)
        self._beside = [output for output in both if output not in self._outputs]
        written = [path(output) for output in self._outputs for path in (bin_path, idx_path, manifest_path)]
        self._written = [*written, self._quarantine]
        with gathering(errors):
            for path in self._written:
                prepare_output(path, "--output-prefix")
        raise_all(errors)
        self._dtype = optimal_dtype(self._tokenizer.vocab_size)
        self._unit_bytes = unit_bytes_for(self._files)
        self._sources = sources_of(self._files, self._unit_bytes)

    def run(self) -> None:
        with Lock(self._folder):
            try:
                if self._is_finished():
                    remove_if_unused(self._folder)
                    return
                for path in self._written:
                    remove_leftovers(path)
                restart = self._settings.restart or self._reads_a_stream()
                self._make(open_parts(self._folder, self._plan(), restart=restart))
            except BaseException:
                remove_if_unused(self._folder)
                raise
            remove(self._folder)

    def _is_finished(self) -> bool:
        """Says so. OutputError where datasets of another job are there and are not to be replaced."""
        if self._settings.force:
            return False
        options = {**self._options(), "on_bad_line": self._settings.on_bad_line}
        job = finished.Job(self._job_sha256(), options, self._tokenizer.sha256)
        begun = is_begun(self._folder, self._plan())
        if not finished.is_finished(self._outputs, job, beside=self._beside, begun=begun):
            self._check_quarantine()
            return False
        for prefix in self._outputs:
            print(f"{prefix}.bin and .idx: already there, nothing to do", flush=True)
        return True

    def _check_quarantine(self) -> None:
        """OutputError where the list of bad lines is of a job with nothing else of this one's: one of other
        keys has other datasets, but the same list. Whose parts there are, `open_parts` asks."""
        its = [self._folder / PLAN, *map(bin_path, self._outputs)]
        if self._quarantine.exists() and not any(path.exists() for path in its):
            raise finished.cannot_replace("--output-prefix", self._quarantine, "written by another job")

    def _make(self, parts: PartsFolder) -> None:
        job = self._job(parts)
        done = parts.done()
        if self._settings.on_bad_line == "fail":
            done = {unit: record for unit, record in done.items() if not record.skipped}
        schedule = Schedule(self._sources, self._unit_bytes, self._shard, done)
        speed = self._encode(job, schedule)
        units = list(schedule.in_order())
        totals = self._totals(record for _, record in units)
        self._refuse_bad(job, schedule, totals.skipped, totals.documents)
        self._refuse_empty(totals)
        join_parts(
            job,
            units,
            {
                index: (prefix, self._known(index, totals, units))
                for index, prefix in enumerate(self._outputs)
                if totals.outputs[index].documents
            },
        )
        write_quarantine(job, units, self._quarantine)
        for prefix, output in zip(self._outputs, totals.outputs, strict=True):
            if not output.documents:
                remove_dataset(prefix)
        for prefix in self._beside:
            remove_dataset(prefix)
        print(describe(self._outputs, self._dtype, totals, units, self._sources), flush=True)
        print(f"  {speed}", flush=True)

    def _encode(self, job: Job, schedule: Schedule) -> str:
        """Do all units that are not done; says how fast it was."""
        skipped = sum(record.skipped for record in schedule.done.values())
        documents = sum(record.documents for record in schedule.done.values())
        before = sum(record.input_bytes for record in schedule.done.values())
        if schedule.done:
            _say(f"going on with {len(schedule.done):,} parts ({before / 1e6:,.1f} MB) that are done")
        noted = False
        with InputProgress("preprocess-data", self._bytes_to_read(), done=before) as progress:
            make = partial(_unit_encoder, job)
            for unit, (record, note) in self._workers.run(make, schedule.next, self._describe_unit):
                if note and not noted:
                    _say(f"sentencepiece encodes, as {note}")
                    noted = True
                schedule.finished(unit, record)
                skipped, documents = skipped + record.skipped, documents + record.documents
                if documents >= _ENOUGH_TO_JUDGE:
                    self._refuse_bad(job, schedule, skipped, documents)
                tokens = sum(output.tokens for output in record.outputs)
                progress.advance(bytes=record.input_bytes, documents=record.documents, tokens=tokens)
        return progress.speed

    def _job(self, parts: PartsFolder) -> Job:
        settings, tokenizer = self._settings, self._tokenizer
        return Job(
            sources=self._sources,
            unit_bytes=self._unit_bytes,
            parts=parts,
            tokenizer_model=tokenizer.path,
            encoder=settings.encoder,
            keys=self._keys,
            vocab_size=tokenizer.vocab_size,
            dtype=self._dtype,
            bos=tokenizer.bos if settings.append_bos else None,
            eod=tokenizer.eod if settings.append_eod else None,
            validation_split=settings.validation_split,
            on_bad_line=settings.on_bad_line,
            shuffle_seed=settings.shuffle_seed,
        )

    def _plan(self) -> dict[str, str]:
        """All that the parts depend on. Not the encoder and the workers: they change nothing."""
        files = {f"input {index}": file.identity for index, file in enumerate(self._files)}
        plan = {"tokenizer_model": self._tokenizer.sha256, "unit_bytes": str(self._unit_bytes)}
        return {"format": str(_FORMAT), **plan, **self._options(), **files}

    def _job_sha256(self) -> str | None:
        if any(file.format == "stream" for file in self._files):
            return None
        return finished.job_sha256({**self._plan(), "on_bad_line": self._settings.on_bad_line})

    def _options(self) -> dict[str, str]:
        settings = self._settings
        return {
            "json_keys": " ".join(self._keys),
            "append_bos": str(settings.append_bos),
            "append_eod": str(settings.append_eod),
            "validation_split": str(settings.validation_split),
            "shuffle_seed": str(settings.shuffle_seed),
            "shard": f"{self._shard.index}/{self._shard.count}",
        }

    def _known(
        self, index: int, totals: Totals, units: Sequence[tuple[Unit, PartRecord]]
    ) -> dict[str, object]:
        """What the manifest of an output says besides what its tokens tell."""
        settings, per_key = self._settings, len(self._outputs) // len(self._keys)
        key = index // per_key
        split = "validation" if index % per_key else "document"
        read = {file for unit, _ in units for file in self._sources[unit.source].files}
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
                "json_key": self._keys[key],
                "split": split,
                TOKENIZER_MODEL: str(self._tokenizer.path),
            },
            "job_sha256": self._job_sha256(),
            "versions": {"llama-mcore": __version__, **{name: version(name) for name in ENCODERS}},
            "inputs": [{"path": str(f.path), "bytes": f.size} for f in self._files if f in read],
        }

    def _totals(self, records: Iterable[PartRecord]) -> Totals:
        return Totals.of(records, len(self._keys), len(self._outputs))

    def _bytes_to_read(self) -> int:
        return sum(file.size for file in self._files) // self._shard.count

    def _reads_a_stream(self) -> bool:
        """What was read of it is gone: a killed job cannot go on."""
        return any(source.format == "stream" for source in self._sources)

    def _describe_unit(self, unit: Unit) -> str:
        source = self._sources[unit.source]
        return f"{source.path}, part {unit.cut:,} of about {self._unit_bytes / 1e6:,.0f} MB"

    def _refuse_bad(self, job: Job, schedule: Schedule, skipped: int, documents: int) -> None:
        if documents and skipped / documents > self._settings.max_bad_ratio:
            done = [(Unit(*place), record) for place, record in sorted(schedule.done.items())]
            write_quarantine(job, done, self._quarantine)
            reason = f"{skipped:,} of {documents:,} documents cannot be used; {self._quarantine} lists them"
            remedy = "fix them, or allow more with --max-bad-ratio"
            raise DataError(Problem("--max-bad-ratio", self._settings.max_bad_ratio, reason, remedy))

    def _refuse_empty(self, totals: Totals) -> None:
        """A whole input without text is a mistake; a shard of a small one may well have none."""
        if self._shard.count > 1:
            return
        written = [any(output.tokens for output in totals.of_key(index)) for index in range(len(self._keys))]
        empty = [key for key, some in zip(self._keys, written, strict=True) if not some]
        if empty:
            remove(self._folder)
            remedy = "check the input files and --json-keys"
            raise DataError(
                [Problem("--input", f"key {key!r}", "no document holds any text", remedy) for key in empty]
            )


def _unit_encoder(job: Job) -> Callable[[Unit], tuple[PartRecord, str | None]]:
    from llama_mcore.preprocess.worker import UnitEncoder  # with workers, only they need it

    return UnitEncoder(job)


def _say(text: str) -> None:
    print(f"preprocess-data: {text}", file=sys.stderr, flush=True)
