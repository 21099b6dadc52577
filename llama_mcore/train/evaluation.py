"""Loss on the held-out text of every source."""

from collections.abc import Iterator

from llama_mcore.data.dataset import WindowDataset
from llama_mcore.data.loader import MicroBatch, eval_batches
from llama_mcore.observe.metrics import HeldOut
from llama_mcore.observe.phases import Phase
from llama_mcore.train.agreement import together
from llama_mcore.train.job import Job
from llama_mcore.train.step import evaluate


def evaluation_is_due(job: Job) -> bool:
    interval, step = job.run.eval.interval, job.state.step
    return step == job.run.train.steps or (interval > 0 and step % interval == 0)


def evaluate_sources(job: Job) -> dict[str, HeldOut] | None:
    """By source, of those that have some; None if the run was asked to stop meanwhile. All ranks call it."""
    job.phases.enter(Phase.EVALUATE, job.state.step)
    found = {}
    for name, dataset in ((source.name, source.valid) for source in job.sources if source.valid):
        evaluated = _evaluate(job, dataset)
        if evaluated is None:
            return None
        found[name] = evaluated
    return found


def _evaluate(job: Job, dataset: WindowDataset) -> HeldOut | None:
    def go_on() -> bool:
        job.phases.beat()
        return not job.is_asked_to_stop()

    batches = together(job.groups, lambda: list(_batches(job, dataset)))
    evaluated = evaluate(job.engine, batches, job.groups, job.run.data.attention_boundary, go_on)
    if evaluated is None:
        return None
    loss, tokens = evaluated
    return HeldOut(loss, tokens, dataset.bytes_per_token)


def _batches(job: Job, dataset: WindowDataset) -> Iterator[MicroBatch]:
    run = job.run
    return eval_batches(
        dataset,
        micro_batch_size=run.train.micro_batch_size,
        num_windows=run.eval.batches * run.train.global_batch_size,
        dp_rank=job.groups.dp_rank,
        dp_size=job.groups.dp_size,
        masked_token=run.data.masked_token,
    )
