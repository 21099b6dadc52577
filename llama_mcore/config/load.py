"""Reading a run's configuration: one YAML file and dotted overrides.

    defaults of the sections  <  file (`--config`)  <  `section.key=value` on the command line

An unknown key is refused with the nearest known name, and all problems are reported together. Imports no
torch.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from llama_mcore.config.checks import check_sources
from llama_mcore.config.schema import RunConfig
from llama_mcore.config.section import Section
from llama_mcore.data.config import DataConfig, SourceConfig
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
from llama_mcore.model.config import PRESETS, ModelConfig
from llama_mcore.small_file import parse_yaml, read_small_file
from llama_mcore.train.config import short_warmup

SectionT = TypeVar("SectionT", bound=Section)
CONFIG_DIR = Path(__file__).parents[1] / "configs"
LARGEST_CONFIG = 256 << 10

# A key that stands for other keys of its section -> those that it replaces when it is an override.
_REPLACES = {
    "model.preset": tuple(ModelConfig.model_fields),
    "data.train": ("valid", "epochs", "mixture", "sources"),
    "data.mixture": ("train", "valid", "epochs", "sources"),
}


def load_config(config: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read `config`, a path or the name of a shipped file, and apply `section.key=value` overrides.

    Checks each section by itself; `check_config` checks them together, for a number of ranks. Raises
    ConfigError with every problem of the content, or MissingInputError where only the file, or that of its
    mixture, is missing.
    """
    content = _read_yaml(_find_config(config))
    errors: list[LlamaMcoreError] = []
    with gathering(errors):
        _check_one_data_source(overrides)
    # Those that replace others come first: a key given beside them wins, wherever it stands.
    for override in sorted(overrides, key=_replaces_others, reverse=True):
        with gathering(errors):
            _apply_override(content, override)
    for expand in (_expand_preset, _expand_mixture):
        with gathering(errors):
            expand(content)
    with gathering(errors):
        run = _with_warmup(_validated(RunConfig, content))
    raise_all(errors)
    return run


def load_mixture(mixture: str, field: str) -> dict[str, SourceConfig]:
    """Read the sources of a mixture, a path or the name of a shipped file, given as the option `field`.

    Raises as `load_config` does.
    """
    content = _read_yaml(_find_config(mixture, field), field)
    sources = _validated(DataConfig, {"sources": content}, "data").sources
    problems = check_sources(sources)
    if not sources:
        problems.append(Problem(field, mixture, "names no source"))
    if problems:
        raise ConfigError(problems)
    return sources


def dump_config(run: RunConfig) -> str:
    """The resolved configuration as YAML; `load_config` reads it back to an equal RunConfig."""
    return yaml.safe_dump(run.model_dump(), sort_keys=False)


def _find_config(config: str | Path, field: str = "--config") -> Path:
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
        raise ConfigError(Problem(field, path, f"cannot be read as YAML ({shown(error)})")) from None
    if not isinstance(data, dict) or not all(isinstance(value, dict) for value in data.values()):
        raise ConfigError(Problem(field, path, "must hold sections of `key: value` lines"))
    return data


def _check_one_data_source(overrides: Iterable[str]) -> None:
    """Refuse data.train beside data.mixture: each replaces the other, so neither can win."""
    given = {key: text for key, _, text in (o.partition("=") for o in overrides if _replaces_others(o))}
    if "data.train" in given and "data.mixture" in given:
        reason = f"names a single source, beside data.mixture = {given['data.mixture']}"
        raise ConfigError(Problem("data.train", given["data.train"], reason, "drop one"))


def _replaces_others(override: str) -> bool:
    key, _, text = override.partition("=")
    return key in _REPLACES and _parsed(text) is not None


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, name = key.split(".")
    if not equals or not sections or not all(sections) or not name:
        raise ConfigError(Problem("override", override, "must have the form section.key=value"))
    section = content
    for part in sections:
        if not isinstance(section.get(part), dict):
            section[part] = {}  # a null or a plain value gives way to the keys below it
        section = section[part]
    if _replaces_others(override):
        for replaced in _REPLACES[key]:
            section.pop(replaced, None)
    section[name] = _parsed(text)


def _parsed(text: str) -> Any:
    """Value of an override: YAML, or else text."""
    try:
        return parse_yaml(text) if text else None
    except ValueError:
        return text


def _expand_preset(content: dict[str, Any]) -> None:
    """Replace `model.preset: 7b` by that preset's fields; fields given beside it win."""
    model = content.get("model")
    if not isinstance(model, dict) or "preset" not in model:
        return
    preset = str(model.pop("preset"))
    if preset not in PRESETS:
        content["model"] = PRESETS["7b"] | model  # so that other problems are found too
        raise ConfigError(Problem("model.preset", preset, "is not a preset", nearest(preset, PRESETS)))
    content["model"] = PRESETS[preset] | model


def _expand_mixture(content: dict[str, Any]) -> None:
    """Replace `data.mixture: FILE` by the sources of that file; settings of a source beside it win."""
    section = content.get("data")
    if not isinstance(section, dict) or "mixture" not in section:
        return
    named, sources = section.pop("mixture"), section.get("sources", {})
    if named is None or not isinstance(sources, dict):
        return
    if not isinstance(named, str):
        raise ConfigError(Problem("data.mixture", named, "must be a path or the name of a shipped mixture"))
    mixture = _read_yaml(_find_config(named, "data.mixture"), "data.mixture")
    section["sources"] = mixture | {
        name: mixture.get(name, {}) | given if isinstance(given, dict) else given
        for name, given in sources.items()
    }


def _validated(kind: type[SectionT], content: dict[str, Any], *above: str) -> SectionT:
    """A section that stands in the sections `above`, named outermost first."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise ConfigError([_problem(details, above) for details in error.errors()]) from None


def _with_warmup(run: RunConfig) -> RunConfig:
    """The run with the paper's warm-up, or a tenth of a short run, where its file gives none."""
    if "warmup_steps" in run.optim.model_fields_set:
        return run
    return run.changed(optim={"warmup_steps": short_warmup(run.train.steps)})


def _problem(details: ErrorDetails, above: Sequence[str]) -> Problem:
    """One pydantic error in the words of the configuration file."""
    location = [*above, *(str(part) for part in details["loc"])]
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
    shorthands = {"model": ["preset"], "data": ["mixture"]}
    return [*fields, *shorthands.get(".".join(location), [])]
