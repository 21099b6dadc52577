"""Installed software: Python, the packages that a run needs and their versions, optional packages, programs.

Every package is imported, since one that is installed may still be broken. Loads no torch by itself: the
doctor must work where torch is broken.
"""

import platform
import shutil
import tomllib
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from llama_mcore import __version__
from llama_mcore.diagnose.finding import Finding, Status
from llama_mcore.errors import shown

GROUP = "required packages"
PRODUCT = "llama-mcore"
# Has pyproject.toml and requirements.txt; beside an installed wheel there is neither.
CLONE = Path(__file__).parents[2]
# Packages that are checked where there is no list of the required ones.
ESSENTIAL = ("torch", "megatron-core", "deepspeed", "numpy", "pydantic", "PyYAML", "sentencepiece")
INSTALL = "pip install -r requirements.txt, then pip install -e . (or make, in a clone)"
# megatron-core imports the optional packages that it finds.
UNINSTALL = "uninstall an optional package that breaks this import"
# Modules whose names differ from their packages'.
MODULES = {"megatron-core": "megatron.core", "pyyaml": "yaml", "protobuf": "google.protobuf"}


@dataclass(frozen=True)
class Demands:
    """Requirements of llama-mcore."""

    python: str
    """Specifier, e.g. ">=3.11"."""
    packages: tuple[str, ...]


@dataclass(frozen=True)
class Optional:
    """A package without which everything runs."""

    module: str
    extensions: tuple[str, ...]
    """Compiled modules that it needs, installed beside it."""
    cost: str
    remedy: str


ON_GPU = "on a machine with a GPU:"
OPTIONAL = {  # besides those of attention backends, which name their own
    "transformers": Optional(
        "transformers",
        (),
        "conversions are not compared with logits and tokens computed by it",
        "pip install -e '.[hf]'",
    ),
    "apex": Optional(
        "apex",
        ("amp_C", "fused_layer_norm_cuda"),
        "model.kernels=apex and optim.implementation=apex cannot be chosen; the default AdamW is fused",
        f"{ON_GPU} build NVIDIA's from source (README, Optional kernels); PyPI's apex is another package",
    ),
    "triton": Optional(
        "triton",
        (),
        "model.kernels=auto is plain on a GPU, which is slower; not needed on the CPU",
        "torch's builds for CUDA include it",
    ),
}

PROGRAMS = {
    "sbatch": "submits jobs",
    "srun": "starts the processes of a job on its nodes",
    "scontrol": "lists the nodes of a job and requeues it",
}


def python_and_packages() -> list[Finding]:
    """Findings on Python and the required packages: whether they are in range, and as the tests have them."""
    demands = demands_of_clone(CLONE) or demands_of_installed(PRODUCT)
    pins = tested_versions(CLONE / "requirements.txt")
    if demands is None:
        meaning = "has neither pyproject.toml nor metadata here: other packages' versions cannot be checked"
        unknown = Finding(GROUP, PRODUCT, "note", __version__, meaning, INSTALL)
        return [unknown, *(required_package(Requirement(name), pins) for name in ESSENTIAL)]
    requirements = filter(applies, map(Requirement, demands.packages))
    return [
        python(SpecifierSet(demands.python), platform.python_version()),
        *(required_package(requirement, pins) for requirement in requirements),
    ]


def demands_of_clone(folder: Path) -> Demands | None:
    """Demands in a clone's pyproject.toml, which may be newer than the metadata of what was installed."""
    path = folder / "pyproject.toml"
    project = tomllib.loads(path.read_text(encoding="utf-8")).get("project", {}) if path.is_file() else {}
    if project.get("name") != PRODUCT:
        return None
    return Demands(project["requires-python"], tuple(project["dependencies"]))


def demands_of_installed(product: str) -> Demands | None:
    """Demands in the metadata of an installed package."""
    try:
        found = metadata.metadata(product)
    except metadata.PackageNotFoundError:
        return None
    return Demands(found["Requires-Python"], tuple(metadata.requires(product) or ()))


def python(wanted: SpecifierSet, version: str) -> Finding:
    fault = misfit(wanted, version)
    remedy = "create a new environment with a Python in that range"
    return Finding(GROUP, "Python", "problem" if fault else "ok", version, fault, fault and remedy, True)


def misfit(wanted: SpecifierSet, version: str) -> str:
    """Reason why a version does not fit; "" where it does."""
    if wanted.contains(version, prereleases=True):
        return ""
    lowest = (Version(one.version) for one in wanted if one.operator in (">=", "~=", "=="))
    return f"too {'old' if Version(version) < max(lowest, default=Version('0')) else 'new'}: must be {wanted}"


def applies(requirement: Requirement) -> bool:
    """True if a requirement applies to this Python, without extras."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def tested_versions(path: Path) -> dict[str, str]:
    """Versions that `path` pins for this Python, by canonical name; none where it does not exist."""
    if not path.is_file():
        return {}
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    pinned = filter(applies, (Requirement(line) for line in lines if "==" in line))
    return {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in pinned}


def required_package(requirement: Requirement, pins: dict[str, str]) -> Finding:
    name, wanted = requirement.name, requirement.specifier
    found = partial(Finding, GROUP, name, required=True)
    module = MODULES.get(canonicalize_name(name), name.replace("-", "_"))
    version = installed_version(name)
    failure = import_failure(module)
    if failure and version is None:
        meaning = f"must be {wanted}" if wanted else "llama-mcore needs it"
        return found("missing", "not installed", meaning, INSTALL)
    if failure:
        meaning = f"cannot be imported: {failure}"
        return found("problem", version or "", meaning, f"{INSTALL}; {UNINSTALL}")
    if version is None:
        return found("note", "version unknown", "cannot be checked without the package's metadata", INSTALL)
    if fault := misfit(wanted, version):
        return found("problem", version, fault, INSTALL)
    tested = pins.get(canonicalize_name(name))
    if tested and version.partition("+")[0] != tested:
        return found("note", version, f"is in range, but untested: the tests run on {tested}", INSTALL)
    return found("ok", version)


def optional_package(name: str, package: Optional) -> Finding:
    found = partial(Finding, "optional packages", name)
    if find_spec(package.module) is None:
        return found("missing", "not installed", package.cost, package.remedy)
    version = installed_version(name) or "version unknown"
    failure = import_failure(package.module)
    if failure:
        meaning = f"cannot be imported: {failure}; {package.cost}"
        return found("problem", version, meaning, package.remedy)
    absent = [extension for extension in package.extensions if find_spec(extension) is None]
    if absent:
        return found("problem", version, f"lacks {', '.join(absent)}; {package.cost}", package.remedy)
    return found("ok", version)


def programs(which: Callable[[str], str | None] = shutil.which) -> list[Finding]:
    findings = []
    for name, purpose in PROGRAMS.items():
        path = which(name)
        status: Status = "ok" if path else "missing"
        meaning = "" if path else f"{purpose}; without Slurm, start runs with llama-mcore torchrun"
        remedy = "" if path else "on a Slurm cluster, use a node where its commands are installed"
        findings.append(Finding("programs", name, status, path or "not found", meaning, remedy))
    return findings


def installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def import_failure(module: str) -> str:
    """Reason why `module` cannot be imported, on one line; "" if it can. Its output is dropped."""
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a package may raise anything, even SystemExit
        return shown(f"{type(error).__name__}: {error}")
    return ""
