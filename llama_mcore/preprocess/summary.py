"""Summary of a preprocessing job: sums over its units, and the lines printed at its end."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from llama_mcore.preprocess.inputs import FileGroup, Unit
from llama_mcore.preprocess.part_store import OutputCounts, PartRecord


@dataclass(frozen=True)
class Totals:
    """Sums over units. For each key: documents = written + set aside for validation + empty + skipped."""

    documents: int
    skipped: int
    empty: list[int]
    outputs: list[OutputCounts]

    @classmethod
    def of(cls, records: Iterable[PartRecord], num_keys: int, num_outputs: int) -> "Totals":
        records = list(records)
        totals = cls(
            documents=sum(record.documents for record in records),
            skipped=sum(record.skipped for record in records),
            empty=[sum(record.empty[key] for record in records) for key in range(num_keys)],
            outputs=[_sum_of([record.outputs[index] for record in records]) for index in range(num_outputs)],
        )
        for key in range(num_keys):
            out = sum(output.documents for output in totals.of_key(key))
            assert totals.documents == out + totals.empty[key] + totals.skipped
        return totals

    def of_key(self, key: int) -> Sequence[OutputCounts]:
        """The outputs of a key: its documents and, if some are set aside for validation, those."""
        per_key = len(self.outputs) // len(self.empty)
        return self.outputs[key * per_key : (key + 1) * per_key]


def describe(
    prefixes: Sequence[str],
    dtype: type[np.integer],
    totals: Totals,
    units: Sequence[tuple[Unit, PartRecord]],
    groups: Sequence[FileGroup],
) -> str:
    """The printed summary; `prefixes` are the datasets of the outputs, in the same order."""
    lines = [
        _describe_output(prefix, output, dtype)
        for prefix, output in zip(prefixes, totals.outputs, strict=True)
    ]
    lines += _describe_arguments(units, groups)
    for key, empty in enumerate(totals.empty):
        written, *validation = (f"{output.documents:,}" for output in totals.of_key(key))
        of_key = f"  {prefixes[key * len(totals.of_key(key))]}: " if len(totals.empty) > 1 else "  "
        held = f" + {validation[0]} set aside for validation" if validation else ""
        lines.append(
            f"{of_key}{totals.documents:,} documents in = {written} written{held} "
            f"+ {empty:,} empty + {totals.skipped:,} skipped"
        )
    return "\n".join(lines)


def _sum_of(counts: Sequence[OutputCounts]) -> OutputCounts:
    return OutputCounts(
        documents=sum(count.documents for count in counts),
        tokens=sum(count.tokens for count in counts),
        text_bytes=sum(count.text_bytes for count in counts),
        longest_document=max((count.longest_document for count in counts), default=0),
    )


def _describe_output(prefix: str, output: OutputCounts, dtype: type[np.integer]) -> str:
    if not output.documents:
        return f"{prefix}: not written, because it has no documents"
    return (
        f"{prefix}.bin and .idx: {output.documents:,} documents, {output.tokens:,} tokens as "
        f"{dtype.__name__}, {output.text_bytes / output.tokens:.2f} bytes per token, "
        f"longest document {output.longest_document:,} tokens"
    )


def _describe_arguments(units: Sequence[tuple[Unit, PartRecord]], groups: Sequence[FileGroup]) -> list[str]:
    """Sums for each --input argument, if there are several."""
    found: dict[str, list[int]] = {}
    for unit, record in units:
        sums = found.setdefault(groups[unit.group].files[0].argument, [0, 0, 0])
        sums[0] += record.input_bytes
        sums[1] += record.documents
        sums[2] += sum(output.tokens for output in record.outputs)
    if len(found) < 2:
        return []
    return [
        f"  {argument}: {size / 1e6:,.1f} MB, {documents:,} documents, {tokens:,} tokens"
        for argument, (size, documents, tokens) in found.items()
    ]
