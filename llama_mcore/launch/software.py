"""What is installed: Python, the packages a run needs against their versions, optional packages, programs.

Every package is imported, since one that is installed may still be broken.
"""

import platform
import shutil
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from llama_mcore.errors import shown
from llama_mcore.launch.finding import Finding, Status

PRODUCT = "llama-mcore"
# Beside the package in a clone; an installed wheel has none.
PINS = Path(__file__).parents[2] / "requirements.txt"
INSTALL = "pip install -r requirements.txt, then pip install -e . (or make, in a clone)"
# megatron-core imports those that it finds.
UNINSTALL = "uninstall a broken optional package that it stumbles over"
# Modules that are not called like their package.
MODULES = {"megatron-core": "megatron.core", "pyyaml": "yaml", "protobuf": "google.protobuf"}


@dataclass(frozen=True)
class Optional:
    """A package without which everything runs."""

    module: str
    extensions: tuple[str, ...]
    """Compiled modules that its use needs, installed beside it."""
    cost: str
    remedy: str


ON_GPU = "on a machine with a GPU:"
OPTIONAL = {
    "transformers": Optional(
        "transformers",
        (),
        "conversions are not compared with the logits and tokens that it computes",
        "pip install -e '.[hf]'",
    ),
    "flash-attn": Optional(
        "flash_attn", (), "model.attention=flash cannot be chosen", f"{ON_GPU} pip install -e '.[flash]'"
    ),
    "xformers": Optional(
        "xformers", (), "model.attention=xformers cannot be chosen", f"{ON_GPU} pip install -e '.[gpu]'"
    ),
    "transformer-engine": Optional(
        "transformer_engine",
        (),
        "model.attention=te cannot be chosen",
        f"{ON_GPU} NVIDIA's instructions; it must match CUDA and torch",
    ),
    "apex": Optional(
        "apex",
        ("amp_C", "fused_layer_norm_cuda"),
        "model.kernels=apex and optim.implementation=apex cannot be chosen; the default AdamW is fused",
        f"{ON_GPU} build NVIDIA's from source (README, Optional kernels), not PyPI's apex",
    ),
    "triton": Optional(
        "triton",
        (),
        "model.kernels=compile has nothing to compile with on a GPU; the CPU needs none",
        "torch's builds for CUDA bring it",
    ),
}

PROGRAMS = {
    "sbatch": "jobs are submitted with it",
    "srun": "starts a job's processes on its nodes",
    "scontrol": "names a job's nodes and puts a job back into the queue",
}


def python_and_packages() -> list[Finding]:
    """Python and the packages that llama-mcore requires. Its metadata says what fits, PINS what is tested."""
    group = "required packages"
    try:
        product = metadata.metadata(PRODUCT)
    except metadata.PackageNotFoundError:
        meaning = "without its metadata the versions of others cannot be checked"
        return [Finding(group, PRODUCT, "missing", "not installed", meaning, INSTALL, required=True)]
    wanted = product["Requires-Python"]
    version = platform.python_version()
    fits = SpecifierSet(wanted).contains(version, prereleases=True)
    python = Finding(
        group,
        "Python",
        "ok" if fits else "problem",
        version,
        "" if fits else f"must be {wanted}",
        "" if fits else "make a new environment with such a Python",
        required=True,
    )
    requirements = map(Requirement, metadata.requires(PRODUCT) or [])
    pins = tested_versions(PINS)
    return [
        python,
        *(
            required_package(requirement, pins)
            for requirement in requirements
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        ),
    ]


def tested_versions(path: Path) -> dict[str, str]:
    """Canonical name of a package -> the version that `path` pins; nothing where there is no such file."""
    if not path.is_file():
        return {}
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    pinned = (line.partition("==") for line in lines if "==" in line)
    return {canonicalize_name(name): version for name, _, version in pinned}


def required_package(requirement: Requirement, pins: dict[str, str]) -> Finding:
    group, name = "required packages", requirement.name
    version = installed_version(name)
    if version is None:
        return Finding(
            group, name, "missing", "not installed", f"must be {requirement.specifier}", INSTALL, True
        )
    failure = import_failure(MODULES.get(canonicalize_name(name), name.replace("-", "_")))
    if failure:
        meaning = f"cannot be imported: {failure}"
        return Finding(group, name, "problem", version, meaning, f"{INSTALL}; {UNINSTALL}", True)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(group, name, "problem", version, f"must be {requirement.specifier}", INSTALL, True)
    tested = pins.get(canonicalize_name(name), version)
    if version.partition("+")[0] != tested:
        return Finding(group, name, "note", version, f"fits, but {tested} is what was tested", INSTALL, True)
    return Finding(group, name, "ok", version, required=True)


def optional_packages(on_gpu: bool) -> list[Finding]:
    return [optional_package(name, package, on_gpu) for name, package in OPTIONAL.items()]


def optional_package(name: str, package: Optional, on_gpu: bool) -> Finding:
    """triton alone is needed on a GPU, where model.kernels=auto is compile."""
    group, required = "optional packages", on_gpu and name == "triton"
    if find_spec(package.module) is None:
        return Finding(group, name, "missing", "not installed", package.cost, package.remedy, required)
    version = installed_version(name) or "version unknown"
    failure = import_failure(package.module)
    if failure:
        meaning = f"cannot be imported: {failure}; {package.cost}"
        return Finding(group, name, "problem", version, meaning, package.remedy, required)
    absent = [extension for extension in package.extensions if find_spec(extension) is None]
    if absent:
        meaning = f"lacks {', '.join(absent)}; {package.cost}"
        return Finding(group, name, "problem", version, meaning, package.remedy, required)
    return Finding(group, name, "ok", version, required=required)


def programs(which: Callable[[str], str | None] = shutil.which) -> list[Finding]:
    findings = []
    for name, purpose in PROGRAMS.items():
        path = which(name)
        status: Status = "ok" if path else "missing"
        meaning = "" if path else f"{purpose}: without Slurm, start runs with llama-mcore torchrun"
        remedy = "" if path else "only on a Slurm cluster: use a node where its commands are installed"
        findings.append(Finding("programs", name, status, path or "not found", meaning, remedy))
    return findings


def installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def import_failure(module: str) -> str:
    """Why `module` cannot be imported, on one line; empty if it can. What it prints meanwhile is dropped."""
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a package may raise anything, even SystemExit
        return shown(f"{type(error).__name__}: {error}")
    return ""
