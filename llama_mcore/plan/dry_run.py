"""Description of a run in one screen, for `--dry-run`. Reads file sizes and imports no torch."""

from pathlib import Path

from llama_mcore.config.schema import RunConfig
from llama_mcore.data.config import DataConfig
from llama_mcore.errors import on_a_line
from llama_mcore.model.config import ModelConfig
from llama_mcore.plan.layout.footprint import memory_of
from llama_mcore.units import format_bytes, format_count

COLUMN = 16


def describe_run(run: RunConfig, world_size: int, run_dir: str = "") -> str:
    """Model, layout, tokens, memory per rank and inputs of a checked run; `run_dir`: state of its folder."""
    sections = [
        _describe_model(run.model),
        _describe_layout(run, world_size),
        _describe_tokens(run, world_size),
        _describe_memory(run, world_size),
        _describe_checkpoints(run, world_size),
        _describe_files(run, run_dir),
    ]
    return "\n".join(sections)


def conclude(run: RunConfig, world_size: int, problems: int) -> str:
    """Last line of a dry run, given the number of problems with files."""
    if problems:
        count = f"{problems} problem{'s' if problems > 1 else ''}"
        return f"Not ready: the settings are consistent, but the files have {count}."
    tokens, state = format_count(_total_tokens(run)), memory_of(run, world_size).state.total
    return f"Ready: {tokens} tokens on {world_size:,} ranks, {format_bytes(state)} of model state each."


def _describe_model(model: ModelConfig) -> str:
    num_params = model.num_params()
    kv = (
        ""
        if model.num_query_groups == model.num_attention_heads
        else f" ({model.num_query_groups} key/value)"
    )
    return "\n".join(
        [
            _line("model", f"{format_count(num_params)} parameters ({num_params:,})"),
            _line(
                "", f"{model.num_layers} layers, hidden {model.hidden_size:,}, ffn {model.ffn_hidden_size:,}"
            ),
            _line("", f"{model.num_attention_heads} heads{kv}, vocabulary {model.vocab_size:,}"),
        ]
    )


def _describe_layout(run: RunConfig, world_size: int) -> str:
    tp, dp = run.parallel.tp, run.parallel.dp(world_size)
    sequence_parallel = "on" if run.parallel.sequence_parallel and tp > 1 else "off"
    return "\n".join(
        [
            _line(
                "layout", f"{world_size:,} ranks = tp {tp} x dp {dp:,}, sequence parallel {sequence_parallel}"
            ),
            _line("", f"ZeRO-{run.zero.stage}, {run.train.precision}, recompute {run.model.recompute}"),
        ]
    )


def _describe_tokens(run: RunConfig, world_size: int) -> str:
    train, steps = run.train, run.accumulation_steps(world_size)
    batch = (
        f"{train.global_batch_size:,} sequences = micro-batch {train.micro_batch_size} "
        f"x dp {run.parallel.dp(world_size):,} x accumulation {steps}"
    )
    tokens = f"{run.tokens_per_step:,} a step, {format_count(_total_tokens(run))} in {train.steps:,} steps"
    return "\n".join([_line("batch", batch), _line("tokens", tokens)])


def _describe_memory(run: RunConfig, world_size: int) -> str:
    found, stage, dp = memory_of(run, world_size), run.zero.stage, run.parallel.dp(world_size)
    state, kept = found.state, found.saved_layers + found.saved_rest
    host = ", host memory" if found.host_state else ""

    def note(dtype: str, sharded_from: int) -> str:
        return f"{dtype}, 1/{dp} on each dp rank" if stage >= sharded_from and dp > 1 else dtype

    rows = [
        ("weights", state.weights, note(run.train.precision, 3)),
        ("gradients", state.gradients, note("fp32", 2) + host),
        ("masters", state.masters, note("fp32", 1) + host),
        ("Adam moments", state.moments, note("2 x fp32", 1) + host),
        ("activations", kept, f"of micro-batch {run.train.micro_batch_size}"),
        (
            "the rest",
            found.total - (state.total - found.host_state) - kept,
            "estimate: buckets, working memory, margin, GPU context",
        ),
        ("total", found.total, "on each rank" + (", without host memory" if host else "")),
    ]
    lines = [_line("memory per rank" if i == 0 else "", _memory_row(*row)) for i, row in enumerate(rows)]
    return "\n".join(lines)


def _describe_checkpoints(run: RunConfig, world_size: int) -> str:
    """Host memory that saves use; the memory of a node is not known here."""
    config, saved = run.checkpoint, memory_of(run, world_size).state.saved
    copy, ring = f"{format_bytes(saved)} for a copy of the saved state", format_bytes(config.ring_bytes)
    waits = "and training waits while a checkpoint is written"
    if config.host_memory is None:
        rows = [
            f"{copy}, pinned on a GPU machine",
            f"on nodes with less than twice that: {ring}, {waits}",
        ]
    elif saved <= config.host_memory:
        rows = [copy]
    else:
        rows = [f"{ring}, {waits}", f"checkpoint.host_memory is less than the {copy}"]
    return "\n".join(_line("" if number else "host memory", row) for number, row in enumerate(rows))


def _memory_row(name: str, count: int, note: str) -> str:
    return f"{name:<13}{format_bytes(count):>10}  {note}"


def _describe_files(run: RunConfig, run_dir: str) -> str:
    rows = [
        (name, path, format_bytes(path.stat().st_size) if path.is_file() else "missing")
        for name, path in _inputs(run.data)
    ]
    rows.append(("run.dir", Path(run.run.dir), run_dir))
    width = max(COLUMN, 2 + max(len(name) for name, _, _ in rows))
    return "\n".join(_line(name, f"{path}  {found}".rstrip(), width) for name, path, found in rows)


def _inputs(data: DataConfig) -> list[tuple[str, Path]]:
    """Setting and path of every file of a run's data."""
    prefixes = [
        (f"{name}.{split}" if data.sources else f"data.{split}", prefix)
        for name, source in data.named_sources.items()
        for split, given in (("train", source.train), ("valid", source.valid or []))
        for prefix in ([given] if isinstance(given, str) else given)
    ]
    files = [(name, Path(prefix + end)) for name, prefix in prefixes for end in (".bin", ".idx")]
    if data.tokenizer:
        files.append(("data.tokenizer", Path(data.tokenizer)))
    return files


def _total_tokens(run: RunConfig) -> int:
    return run.tokens_per_step * run.train.steps


def _line(name: str, text: str, width: int = COLUMN) -> str:
    """One line of the description, with the user's control characters escaped."""
    return on_a_line(f"{name:<{width}}{text}")
