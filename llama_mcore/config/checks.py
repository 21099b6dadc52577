"""Checks across the sections of a configuration: divisibility, batch arithmetic, settings that clash."""

from collections.abc import Iterator

from llama_mcore.config.schema import RunConfig
from llama_mcore.data.config import DataConfig, SourceConfig
from llama_mcore.distributed.config import ParallelConfig
from llama_mcore.errors import ConfigError, Problem
from llama_mcore.model.config import ModelConfig
from llama_mcore.train.config import TrainConfig, short_warmup

_LARGEST_DP = 1 << 20  # where the search for a number of ranks ends


def check_config(run: RunConfig, world_size: int) -> None:
    """Check for `world_size` ranks what no section can check alone.

    Raises one ConfigError with all problems.
    """
    problems = [
        *_check_model(run.model),
        *_check_splits(run.model, run.parallel),
        *_check_batch(run.train, run.parallel, world_size),
        *_check_data(run.data, run.model.vocab_size),
        *_check_training(run),
    ]
    if problems:
        raise ConfigError(problems)


def check_sources(sources: dict[str, SourceConfig]) -> list[Problem]:
    """Problems of a mixture: its sources are planned by epochs or by weights, all in the same way."""
    problems = []
    planned_by = {
        name: "epochs" if source.epochs else "weight" if source.weight else "neither"
        for name, source in sources.items()
    }
    if sources and set(planned_by.values()) not in ({"epochs"}, {"weight"}):
        value = ", ".join(f"{name}: {by}" for name, by in planned_by.items())
        problems.append(Problem("data.sources", value, "must all give epochs, or all give weight"))
    problems += [
        Problem(f"data.sources.{name}", "epochs and weight", "only one may be given", "weight has max_epochs")
        for name, source in sources.items()
        if source.epochs and source.weight
    ]
    return problems


def _check_model(model: ModelConfig) -> Iterator[Problem]:
    heads, groups = model.num_attention_heads, model.num_query_groups
    derived_head_dim, rest = divmod(model.hidden_size, heads)
    if rest and model.head_dim == derived_head_dim:
        reason = f"must be divisible by model.num_attention_heads = {heads}"
        remedy = "change one of them, or set model.head_dim"
        yield Problem("model.hidden_size", model.hidden_size, reason, remedy)
    if heads % groups:
        yield Problem("model.num_query_groups", groups, f"must divide model.num_attention_heads = {heads}")
    if model.head_dim % 2:
        remedy = "rotary embedding rotates pairs of channels"
        yield Problem("model.head_dim", model.head_dim, "must be even", remedy)
    scaling = model.rope_scaling
    if scaling and scaling.low_freq_factor >= scaling.high_freq_factor:
        reason = f"must be below model.rope_scaling.high_freq_factor = {scaling.high_freq_factor}"
        yield Problem("model.rope_scaling.low_freq_factor", scaling.low_freq_factor, reason)


def _check_splits(model: ModelConfig, parallel: ParallelConfig) -> Iterator[Problem]:
    fields = ["num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size"]
    if parallel.sequence_parallel:
        fields.append("seq_length")
    for field in fields:
        value = getattr(model, field)
        if value % parallel.tp:
            divisors = ", ".join(str(n) for n in range(1, min(value, 64) + 1) if value % n == 0)
            reason = f"must be divisible by parallel.tp = {parallel.tp}"
            yield Problem(f"model.{field}", value, reason, f"choose tp from {divisors}")


def _check_batch(train: TrainConfig, parallel: ParallelConfig, world_size: int) -> Iterator[Problem]:
    if world_size < 1 or world_size % parallel.tp:
        reason = f"must be divisible by parallel.tp = {parallel.tp}"
        worlds = _worlds_that_fit(train, parallel, world_size) or parallel.tp
        remedy = f"start {worlds} ranks or change parallel.tp"
        yield Problem("world size", world_size, reason, remedy)
        return
    batch, micro, dp = train.global_batch_size, train.micro_batch_size, parallel.dp(world_size)
    per_pass = micro * dp
    if batch % per_pass:
        reason = f"must be divisible by train.micro_batch_size * dp = {micro} * {dp} = {per_pass}"
        remedy = f"the nearest that fits is {per_pass * max(1, round(batch / per_pass))}"
        if worlds := _worlds_that_fit(train, parallel, world_size):
            remedy += f"; or start {worlds} ranks"
        yield Problem("train.global_batch_size", batch, reason, remedy)


def _worlds_that_fit(train: TrainConfig, parallel: ParallelConfig, world_size: int) -> str:
    """The nearest numbers of ranks that divide the global batch, one below and one above if there are."""
    tp, dp = parallel.tp, parallel.dp(world_size)
    passes, rest = divmod(train.global_batch_size, train.micro_batch_size)
    if rest:
        return ""
    fewer = (n for n in range(min(dp, passes), 0, -1) if passes % n == 0 and n * tp < world_size)
    larger = range(max(dp, 1), min(passes, _LARGEST_DP) + 1)
    more = (n for n in larger if passes % n == 0 and n * tp > world_size)
    return " or ".join(str(n * tp) for n in (next(fewer, 0), next(more, 0)) if n)


def _check_data(data: DataConfig, vocab_size: int) -> Iterator[Problem]:
    if data.train is not None and data.sources:
        yield Problem("data.train", data.train, "names a single source, beside data.sources", "drop one")
        return
    if data.train is None and not data.sources:
        yield Problem("data.train", "(not given)", "is required", "add it, or data.sources")
        return
    if data.eod_token >= vocab_size:
        reason = f"must be below model.vocab_size = {vocab_size}"
        yield Problem("data.eod_token", data.eod_token, reason)
    for setting in ("valid", "epochs"):
        value = getattr(data, setting)
        if data.sources and value != type(data).model_fields[setting].default:
            reason = "belongs to data.train; each of data.sources has its own"
            yield Problem(f"data.{setting}", value, reason, "drop it")
    yield from check_sources(data.sources)


def _check_training(run: RunConfig) -> Iterator[Problem]:
    if run.zero.stage == 0 and run.train.precision == "bf16":
        reason = (
            "cannot run with train.precision = bf16: DeepSpeed then clips by a gradient norm that counts the "
            "shards of tensor-parallel rank 0 only"
        )
        remedy = "set zero.stage=1, which needs no more memory, or train.precision=fp32"
        yield Problem("zero.stage", 0, reason, remedy)
    warmup, steps = run.optim.warmup_steps, run.train.steps
    if warmup > steps:
        remedy = (
            f"set optim.warmup_steps={short_warmup(steps)}, the default of a run of this length, or "
            f"train.steps={warmup} or more"
        )
        yield Problem("optim.warmup_steps", warmup, f"must not exceed train.steps = {steps}", remedy)
    profiled = max((steps[-1] for steps in run.observe.profiled_steps), default=0)
    if profiled > steps:
        reason = f"must not exceed train.steps = {steps}"
        yield Problem("observe.profile", run.observe.profile, reason, "name steps that the run trains")
    if run.eval.interval and not run.data.has_validation:
        remedy = "set data.valid=PREFIX, or valid of a source, or eval.interval=0"
        yield Problem("eval.interval", run.eval.interval, "needs validation data", remedy)
