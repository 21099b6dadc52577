"""A run's configuration: one YAML file, dotted overrides, and the checks across sections.

    defaults of the sections  <  file (`--config`)  <  `section.key=value` on the command line

Every key is known to one section, an unknown one is refused with the nearest name, and all
problems are reported together. Nothing here imports torch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import yaml
from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails

from llama_mcore.checkpoint.config import CheckpointConfig
from llama_mcore.config.section import Section
from llama_mcore.data.config import DataConfig, SourceConfig
from llama_mcore.distributed.config import ParallelConfig, ZeroConfig
from llama_mcore.errors import (
    ConfigError,
    LlamaMcoreError,
    MissingInputError,
    Problem,
    gathering,
    input_problem,
    nearest,
    raise_all,
    shown,
)
from llama_mcore.model.config import PRESETS, ModelConfig, RopeScaling
from llama_mcore.observe.config import ObserveConfig
from llama_mcore.small_file import parse_yaml, read_small_file
from llama_mcore.train.config import EvalConfig, HealthConfig, OptimConfig, TrainConfig, short_warmup
from llama_mcore.watchdog.config import WatchdogConfig

CONFIG_DIR = Path(__file__).parents[1] / "configs"
LARGEST_CONFIG = 256 << 10
_LARGEST_DP = 1 << 20  # where the search for a number of ranks ends


class RunSection(Section):
    dir: str
    """Folder of the run: metrics, checkpoints, TensorBoard events, the resolved configuration."""
    seed: int = Field(default=1234, ge=0, lt=1 << 32)
    """Seed of the initial weights and of the data order: 32 bits, of which torch on a CPU reads no more."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What ranks compute on: cuda, a GPU each; cpu; auto, GPUs where there are any."""
    deterministic: bool = False
    """Choose kernels that give the same bits each time. The CPU's do so anyway; on a GPU the fastest backward
    of attention adds in any order, so that a resumed run has the same state and data, and losses that agree
    with those of an uninterrupted one to rounding."""


class RunConfig(Section):
    """Everything that decides what a run computes."""

    run: RunSection
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    zero: ZeroConfig = ZeroConfig()
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    observe: ObserveConfig = ObserveConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    health: HealthConfig = HealthConfig()

    def data_parallel_size(self, world_size: int) -> int:
        """Data-parallel ranks of a world."""
        return self.parallel.dp(world_size)

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches that one rank runs per optimizer step."""
        return self.train.global_batch_size // (
            self.train.micro_batch_size * self.data_parallel_size(world_size)
        )

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch_size * self.model.seq_length

    def changed(self, **sections: dict[str, Any]) -> "RunConfig":
        """The same with these fields of these sections. Nothing is checked: `check_run` does."""
        return self.model_copy(
            update={name: getattr(self, name).model_copy(update=new) for name, new in sections.items()}
        )


def load_run(config: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read `config` (a path, or the name of a shipped file) and apply `section.key=value` overrides.

    Raises ConfigError with every problem of the content; MissingInputError if all that is wrong is that
    there is no such file, or none of its mixture.
    """
    data = _read_yaml(_find_config(config))
    errors: list[LlamaMcoreError] = []
    with gathering(errors):
        _check_stand_ins(overrides)
    for override in sorted(overrides, key=_stands_for_others, reverse=True):
        with gathering(errors):
            if _stands_for_others(override):
                _drop_replaced(data, override)
            _apply_override(data, override)
    for expand in (_expand_preset, _expand_mixture):
        with gathering(errors):
            expand(data)
    with gathering(errors):
        run = _with_warmup(_validated(data))
    raise_all(errors)
    return run


def _validated(data: dict[str, Any]) -> RunConfig:
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError([_problem(details) for details in error.errors()]) from None


def _with_warmup(run: RunConfig) -> RunConfig:
    """Where the file gives none: the paper's, or a share of a run that is short beside them."""
    if "warmup_steps" in run.optim.model_fields_set:
        return run
    return run.changed(optim={"warmup_steps": short_warmup(run.train.steps)})


def load_mixture(mixture: str, field: str) -> dict[str, SourceConfig]:
    """The sources of a mixture's file (a path, or the name of a shipped one), for an option `field`.

    Raises as `load_run` does.
    """
    content = _read_yaml(_find_config(mixture, field), field)
    try:
        sources = DataConfig.model_validate({"sources": content}).sources
    except ValidationError as error:
        located = [{**details, "loc": ("data", *details["loc"])} for details in error.errors()]
        raise ConfigError([_problem(cast(ErrorDetails, details)) for details in located]) from None
    problems = _check_sources(sources)
    if not sources:
        problems.append(Problem(field, mixture, "names no source"))
    if problems:
        raise ConfigError(problems)
    return sources


def dump_run(run: RunConfig) -> str:
    """The resolved configuration as YAML; `load_run` reads it back to an equal RunConfig."""
    return yaml.safe_dump(run.model_dump(), sort_keys=False)


def check_run(run: RunConfig, world_size: int) -> None:
    """Check what no section can check alone. Raises one ConfigError with all problems."""
    problems = [
        *_check_model(run),
        *_check_parallel(run),
        *_check_batch(run, world_size),
        *_check_data(run),
        *_check_training(run),
    ]
    if problems:
        raise ConfigError(problems)


def _find_config(config: str, field: str = "--config") -> Path:
    for path in (Path(config), CONFIG_DIR / f"{config}.yaml"):
        if path.is_file():
            return path
    mixtures = "mixture" in field
    names = (path.stem for path in CONFIG_DIR.glob("*.yaml"))
    shipped = sorted(name for name in names if name.startswith("mixture") == mixtures)
    raise MissingInputError(input_problem(field, config, f"give a path or one of {', '.join(shipped)}"))


def _read_yaml(path: Path, field: str = "--config") -> dict[str, Any]:
    try:
        data = parse_yaml(read_small_file(path, LARGEST_CONFIG, follow=True).decode())
    except (OSError, ValueError) as error:
        raise ConfigError(Problem(field, path, f"is not YAML ({shown(error)})")) from None
    if not isinstance(data, dict) or not all(isinstance(value, dict) for value in data.values()):
        raise ConfigError(Problem(field, path, "must hold sections of `key: value` lines"))
    return data


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, name = key.split(".")
    if not equals or not sections or not all(sections) or not name:
        raise ConfigError(Problem("override", override, "must read section.key=value"))
    section = data
    for part in sections:
        if not isinstance(section.get(part), dict):
            section[part] = {}  # a null or a plain value gives way to the keys below it
        section = section[part]
    section[name] = _value(text)


def _value(text: str) -> Any:
    """What an override says after its `=`: YAML, or else text."""
    try:
        return parse_yaml(text) if text else None
    except ValueError:
        return text


# A key that stands for others -> what of its section it puts aside when it comes from the command line.
_REPLACES = {
    "model.preset": tuple(ModelConfig.model_fields),
    "data.train": ("valid", "epochs", "mixture", "sources"),
    "data.mixture": ("train", "valid", "epochs", "sources"),
}


def _stands_for_others(override: str) -> bool:
    key, _, text = override.partition("=")
    return key in _REPLACES and _value(text) is not None


def _check_stand_ins(overrides: Sequence[str]) -> None:
    """Of two that each put the other aside, neither can win."""
    given = {key: text for key, _, text in (o.partition("=") for o in overrides if _stands_for_others(o))}
    if "data.train" in given and "data.mixture" in given:
        reason = f"stands for a single source, beside data.mixture = {given['data.mixture']}"
        raise ConfigError(Problem("data.train", given["data.train"], reason, "drop one"))


def _drop_replaced(data: dict[str, Any], override: str) -> None:
    key, _, _ = override.partition("=")
    section = data.get(key.partition(".")[0]) or {}
    for name in _REPLACES[key]:
        section.pop(name, None)


def _expand_preset(data: dict[str, Any]) -> None:
    """`model.preset: 7b` stands for that preset's fields; fields beside it win."""
    model = data.get("model")
    if not isinstance(model, dict) or "preset" not in model:
        return
    preset = str(model.pop("preset"))
    if preset not in PRESETS:
        data["model"] = PRESETS["7b"] | model  # so that what else is wrong can be told
        raise ConfigError(Problem("model.preset", preset, "is no preset", nearest(preset, PRESETS)))
    data["model"] = {**PRESETS[preset], **model}


def _expand_mixture(data: dict[str, Any]) -> None:
    """`data.mixture: FILE` stands for the sources of that file; what is said of a source beside it wins."""
    section = data.get("data")
    if not isinstance(section, dict) or "mixture" not in section:
        return
    named, sources = section.pop("mixture"), section.get("sources", {})
    if named is None or not isinstance(sources, dict):
        return
    if not isinstance(named, str):
        raise ConfigError(Problem("data.mixture", named, "must be a path or the name of a shipped mixture"))
    mixture = _read_yaml(_find_config(named, "data.mixture"), "data.mixture")
    beside = {
        name: {**mixture.get(name, {}), **said} if isinstance(said, dict) else said
        for name, said in sources.items()
    }
    section["sources"] = {**mixture, **beside}


def _problem(details: ErrorDetails) -> Problem:
    """One pydantic error in the words of the configuration file."""
    location = [str(part) for part in details["loc"]]
    field = ".".join(location)
    if details["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        return Problem(field, details["input"], "is not a known key", nearest(location[-1], known))
    if details["type"] == "missing":
        return Problem(field, "(not given)", "is required", f"add it to the file or as {field}=VALUE")
    if details["type"] in ("model_type", "dict_type"):
        return Problem(field, details["input"], "must hold keys with values")
    return Problem(field, details["input"], details["msg"][0].lower() + details["msg"][1:])


def _known_keys(location: Sequence[str]) -> list[str]:
    fields = RunConfig.model_fields
    for part in location:
        annotation = fields[part].annotation if part in fields else None
        # a section, or the one inside `Section | None` or `dict[str, Section]`
        for kind in (annotation, *get_args(annotation)):
            if isinstance(kind, type) and issubclass(kind, Section):
                fields = kind.model_fields
    stand_ins = {"model": ["preset"], "data": ["mixture"]}
    return [*fields, *(stand_ins.get(location[0], []) if len(location) == 1 else [])]


def _check_model(run: RunConfig) -> list[Problem]:
    model, problems = run.model, []
    derived_head_dim, rest = divmod(model.hidden_size, model.num_attention_heads)
    if rest and model.head_dim == derived_head_dim:
        problems.append(
            Problem(
                "model.hidden_size",
                model.hidden_size,
                f"must be divisible by model.num_attention_heads = {model.num_attention_heads}",
                "change one of them, or set model.head_dim",
            )
        )
    if model.num_attention_heads % model.num_query_groups:
        problems.append(
            Problem(
                "model.num_query_groups",
                model.num_query_groups,
                f"must divide model.num_attention_heads = {model.num_attention_heads}",
            )
        )
    if model.head_dim % 2:
        problems.append(
            Problem(
                "model.head_dim", model.head_dim, "must be even", "rotary embedding turns pairs of channels"
            )
        )
    scaling = model.rope_scaling
    if scaling and scaling.low_freq_factor >= scaling.high_freq_factor:
        reason = f"must be below model.rope_scaling.high_freq_factor = {scaling.high_freq_factor}"
        problems.append(Problem("model.rope_scaling.low_freq_factor", scaling.low_freq_factor, reason))
    return problems


def _check_parallel(run: RunConfig) -> list[Problem]:
    model, tp = run.model, run.parallel.tp
    split = {
        "model.num_attention_heads": model.num_attention_heads,
        "model.num_query_groups": model.num_query_groups,
        "model.ffn_hidden_size": model.ffn_hidden_size,
        "model.vocab_size": model.vocab_size,
    }
    if run.parallel.sequence_parallel:
        split["model.seq_length"] = model.seq_length
    return [
        Problem(
            field, value, f"must be divisible by parallel.tp = {tp}", f"choose tp from {_divisors(value)}"
        )
        for field, value in split.items()
        if value % tp
    ]


def _divisors(value: int) -> str:
    return ", ".join(str(n) for n in range(1, min(value, 64) + 1) if value % n == 0)


def _check_batch(run: RunConfig, world_size: int) -> list[Problem]:
    tp, train = run.parallel.tp, run.train
    if world_size < 1 or world_size % tp:
        return [
            Problem(
                "world size",
                world_size,
                f"must be divisible by parallel.tp = {tp}",
                f"start {_worlds_that_fit(run, world_size) or tp} ranks or change parallel.tp",
            )
        ]
    per_pass = train.micro_batch_size * run.data_parallel_size(world_size)
    if train.global_batch_size % per_pass:
        worlds = _worlds_that_fit(run, world_size)
        nearest = per_pass * max(1, round(train.global_batch_size / per_pass))
        return [
            Problem(
                "train.global_batch_size",
                train.global_batch_size,
                f"must be divisible by train.micro_batch_size * dp = {train.micro_batch_size} * "
                f"{run.data_parallel_size(world_size)} = {per_pass}",
                f"nearest that fits: {nearest}{f'; or start {worlds} ranks' if worlds else ''}",
            )
        ]
    return []


def _worlds_that_fit(run: RunConfig, world_size: int) -> str:
    """The nearest numbers of ranks that divide the global batch, one below and one above if there are."""
    tp, train = run.parallel.tp, run.train
    passes, rest = divmod(train.global_batch_size, train.micro_batch_size)
    if rest:
        return ""
    dp = run.data_parallel_size(world_size)
    fewer = (n for n in range(min(dp, passes), 0, -1) if passes % n == 0 and n * tp < world_size)
    larger = range(max(dp, 1), min(passes, _LARGEST_DP) + 1)
    more = (n for n in larger if passes % n == 0 and n * tp > world_size)
    nearest = [next(fewer, 0), next(more, 0)]
    return " or ".join(str(n * tp) for n in nearest if n)


def _check_data(run: RunConfig) -> list[Problem]:
    data = run.data
    if data.train is not None and data.sources:
        return [
            Problem("data.train", data.train, "stands for a single source, beside data.sources", "drop one")
        ]
    if data.train is None and not data.sources:
        return [Problem("data.train", "(not given)", "is required", "add it, or data.sources")]
    problems = []
    if data.eod_token >= run.model.vocab_size:
        reason = f"must be below model.vocab_size = {run.model.vocab_size}"
        problems.append(Problem("data.eod_token", data.eod_token, reason))
    for setting in ("valid", "epochs"):
        if data.sources and getattr(data, setting) != type(data).model_fields[setting].default:
            reason = "belongs to data.train; each of data.sources has its own"
            problems.append(Problem(f"data.{setting}", getattr(data, setting), reason, "drop it"))
    return problems + _check_sources(data.sources)


def _check_sources(sources: dict[str, SourceConfig]) -> list[Problem]:
    problems = []
    planned_by = {
        name: "epochs" if source.epochs else "weight" if source.weight else "neither"
        for name, source in sources.items()
    }
    if sources and set(planned_by.values()) not in ({"epochs"}, {"weight"}):
        reason = "all must give epochs, or all weight"
        problems.append(
            Problem("data.sources", ", ".join(f"{n}: {p}" for n, p in planned_by.items()), reason)
        )
    problems += [
        Problem(f"data.sources.{name}", "epochs and weight", "exclude each other", "weight has max_epochs")
        for name, source in sources.items()
        if source.epochs and source.weight
    ]
    return problems


def _check_training(run: RunConfig) -> list[Problem]:
    problems = []
    if run.zero.stage == 0 and run.train.precision == "bf16":
        problems.append(
            Problem(
                "zero.stage",
                0,
                "cannot run with train.precision = bf16: DeepSpeed then clips by a gradient norm that counts "
                "the shards of tensor-parallel rank 0 only",
                "set zero.stage=1, which needs no more memory, or train.precision=fp32",
            )
        )
    if run.model.layer == "stock" and run.model.recompute == "selective":
        problems.append(
            Problem(
                "model.recompute",
                "selective",
                "is the hand-written backward of model.layer = llama, which the stock layer has not",
                "set model.recompute=none or full",
            )
        )
    if run.model.layer == "stock" and run.data.reset_attention_at_eod:
        problems.append(
            Problem(
                "data.reset_attention_at_eod",
                True,
                "needs model.layer = llama: megatron-core's own attention takes no documents",
            )
        )
    stretch = run.model.rope_scaling
    if run.model.layer == "stock" and stretch and stretch != RopeScaling(factor=stretch.factor):
        problems.append(
            Problem(
                "model.rope_scaling",
                stretch.model_dump(),
                "needs model.layer = llama: megatron-core's own knows Llama 3's bounds 1, 4 and 8192 only",
            )
        )
    if run.optim.warmup_steps > run.train.steps:
        problems.append(
            Problem(
                "optim.warmup_steps",
                run.optim.warmup_steps,
                f"must not exceed train.steps = {run.train.steps}",
                f"optim.warmup_steps={short_warmup(run.train.steps)}, as for a file that gives none, "
                f"or train.steps={run.optim.warmup_steps} and more",
            )
        )
    if run.eval.interval and not run.data.has_validation:
        problems.append(
            Problem(
                "eval.interval",
                run.eval.interval,
                "needs validation data",
                "add data.valid=PREFIX, or valid of a source, or eval.interval=0",
            )
        )
    return problems
