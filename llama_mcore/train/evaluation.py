"""Loss on the validation text of every source."""

from collections.abc import Iterator
from itertools import islice

from llama_mcore.data.loader import MicroBatch, eval_batches, validation_windows
from llama_mcore.data.windows import WindowDataset
from llama_mcore.distributed.collectives import together
from llama_mcore.observe.metrics import ValidationLoss
from llama_mcore.observe.phases import Phase
from llama_mcore.train.setup import Job
from llama_mcore.train.step import evaluate

_READ_TOGETHER = 16


def evaluation_is_due(job: Job) -> bool:
    interval, step = job.run.eval.interval, job.state.step
    return step == job.run.train.steps or (interval > 0 and step % interval == 0)


def evaluate_sources(job: Job) -> dict[str, ValidationLoss] | None:
    """By source, of those that have some; None if the run was asked to stop meanwhile. All ranks call it."""
    job.phases.enter(Phase.EVALUATE, job.state.step)
    found = {}
    for name, dataset in ((source.name, source.valid) for source in job.sources if source.valid):
        evaluated = _evaluate(job, dataset)
        if evaluated is None:
            return None
        found[name] = evaluated
    return found


def _evaluate(job: Job, dataset: WindowDataset) -> ValidationLoss | None:
    run, groups = job.run, job.groups

    def go_on() -> bool:
        job.phases.beat()
        return not job.is_asked_to_stop()

    windows = validation_windows(_wanted(job), dataset.num_windows)
    batches = eval_batches(
        dataset,
        windows,
        micro_batch_size=run.train.micro_batch_size,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        masked_token=run.data.masked_token,
    )
    evaluated = evaluate(job.engine, _read(batches, job), groups, run.data.attention_boundary, go_on)
    if evaluated is None:
        return None
    loss, tokens = evaluated
    return ValidationLoss(loss, tokens, dataset.bytes_per_token, len(windows), dataset.num_windows)


def _wanted(job: Job) -> int | None:
    """Windows of an evaluation now; None for all."""
    run = job.run
    is_last = job.state.step == run.train.steps
    batches = run.eval.final_batches if is_last else run.eval.batches
    return batches * run.train.global_batch_size or None


def _read(batches: Iterator[MicroBatch], job: Job) -> Iterator[MicroBatch]:
    """The same, some at a time: a rank that cannot read stops all, and a large set is never held."""
    while some := together(job.groups, lambda: list(islice(batches, _READ_TOGETHER))):
        job.phases.beat()
        yield from some
