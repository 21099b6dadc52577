"""The import direction and the banned calls of the package. Each checker is itself tried on a bad source."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.world import ROOT, TIMEOUT_S

PACKAGE = ROOT / "llama_mcore"
SOURCES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted((ROOT / "tools").glob("*.py"))

BASE = {"config.section", "errors", "files", "progress", "small_file", "units"}
CONFIGURED = ("model", "distributed", "data", "train", "checkpoint", "observe", "watchdog")
CONFIGS = {f"{package}.config" for package in CONFIGURED} | {"model.parameters"}

# Module, or package with all in it -> what of llama_mcore it may import. The longest name that fits decides.
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "installed": set(),
    "progress": set(),
    "small_file": set(),
    "files": {"errors"},
    "units": {"errors"},
    "picture": {"files"},
    "config": BASE | CONFIGS | {"config"},
    "config.section": set(),
    **dict.fromkeys(CONFIGS, BASE | CONFIGS),
    "distributed": BASE | {"distributed"},
    "model": BASE | {"model", "distributed"},
    "observe": BASE | {"observe", "picture"},
    # Upward: what a step did, as a share of what the planner's table says that the GPU can do.
    "observe.mfu": {"config.run", "plan.layout.flops", "plan.layout.hardware"},
    # A process without torch; what it says to the one that trains has words of its own.
    "watchdog": {
        *("errors", "small_file", "watchdog", "distributed.launch_env", "distributed.rank_on_host"),
        *("observe.phases", "observe.goodput.attempts", "observe.goodput.no_progress"),
    },
    # A leaf, as the sections of a configuration are.
    "data.tokenizer": BASE,
    "data": BASE | {"data", "data.tokenizer"},
    "preprocess": BASE | {"preprocess", "data", "data.tokenizer"},
    "tokenizer": BASE | {"tokenizer", "preprocess", "data"},
    "checkpoint": BASE | {"checkpoint", "model", "distributed", "data", "observe", "config"},
    # Records without behaviour: what a checkpoint stores beside the tensors.
    "checkpoint.train_state": {"data.data_plan", "config.section"},
    "convert": BASE
    | {"convert", "checkpoint", "model", "distributed", "data", "data.tokenizer", "config"}
    | {"observe.log"},
    "generate": BASE
    | {"generate", "convert", "model", "distributed", "data.tokenizer", "observe.log", "config"},
    "train": BASE
    | {"train", "model", "distributed", "data", "checkpoint", "observe", "watchdog.signals", "config"},
    # Decides by numbers alone: no tensor, no clock, no file.
    "train.health": {"train.config", "checkpoint.train_state"},
    "plan": BASE | CONFIGS | {"plan", "config", "picture", "distributed.ds_file"},
    "diagnose": {"errors", "diagnose"},
    # What the doctor says of backends and devices it asks them.
    "diagnose.backends": {"errors", "diagnose", "model", "distributed.device"},
    "diagnose.smoke": {"errors", "diagnose", "model", "distributed.device"},
    "diagnose.gpus": {"errors", "diagnose", "distributed.device"},
    "diagnose.limits": {"errors", "diagnose", "units", "distributed.cgroup"},
    "diagnose.loopback": {"errors", "diagnose", "distributed.device"},
    "diagnose.doctor": {"errors", "diagnose", "distributed.device"},
    "diagnose.allreduce": {"distributed.device"},
    "diagnose.versions": {"distributed.device", "small_file"},
    "diagnose.limited": set(),
    # It looks at what a run will look at, with the same functions.
    "diagnose.checks_run": {
        *("errors", "units", "diagnose", "config", "data", "plan.dry_run"),
        *("checkpoint.paths", "checkpoint.run_lock", "checkpoint.start", "observe.goodput.no_progress"),
    },
    "diagnose.checks_node": {
        *("errors", "units", "diagnose", "config", "plan", "model"),
        *("distributed.cgroup", "distributed.device", "checkpoint.run_dir"),
    },
    "diagnose.preflight": {"errors", "diagnose", "config", "distributed", "train.consistency"},
    "launch": {
        *("errors", "launch", "watchdog", "distributed.launch_env", "distributed.rendezvous"),
        "distributed.store",
    },
    # Checks a run as `train --dry-run` does, and writes a file whole or not at all.
    "launch.slurm": {
        *("errors", "units", "files", "config", "train.ds_config", "diagnose.checks_run"),
    },
    "benchmark": BASE
    | {"benchmark", "train", "model", "distributed", "data", "preprocess", "tokenizer", "checkpoint"}
    | {"convert", "observe", "plan", "config"},
    "cli": {""},  # everything
}

# Library -> where it may be imported.
LIBRARY_BORDERS = {
    "megatron": ("model.", "distributed.", "data.indexed_dataset", "convert.formats.megatron"),
    "deepspeed": ("train.engine", "checkpoint."),
}

# Module -> the package that has it, where the names differ.
PACKAGES = {"yaml": "pyyaml", "megatron": "megatron-core"}
# What a user may leave out: the extras, and what is built from its source.
OPTIONAL_LIBRARIES = {"transformers", "flash-attn", "xformers", "transformer-engine"}
# torch writes TensorBoard's events with the one, SentencePiece reads its models with the other.
REQUIRED_BY_OTHERS = {"tensorboard", "protobuf"}

# Arithmetic that works on any device and in one process. layer_function is given its collectives.
MODEL_MATHS = (
    "model.precision",
    "model.rope",
    "model.swiglu",
    "model.attention.backend",
    "model.attention.documents",
    "model.attention.reference_backend",
    "model.attention.cudnn_backend",
    "model.attention.efficient_backend",
    "model.attention.flash_backend",
    "model.attention.torch_layout",
)
# Names of other people's modules and classes.
FOREIGN_NAMES = ("fused_layer_norm_cuda", "CudaGraphModule", "CudaGraphScope", "InferenceCudaGraphScope")
# `config` names the setting, the last two describe a machine and its environment; they place no tensor.
DEVICE_FILES = (
    "distributed.device",
    "distributed.mcore_cpu",
    "config.run",
    "diagnose.gpus",
    "diagnose.environment",
)
WITHOUT_TORCH = (
    *sorted(CONFIGS),
    "errors",
    "config.section",
    "config.run",
    "cli.commands",
    "distributed.launch_env",
    "observe.goodput.no_progress",
    "launch.slurm",
    "watchdog.supervisor",
    "observe.goodput.attempts",
    "cli.plan",
    "cli.plan_layout",
    *sorted(
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for path in (PACKAGE / "plan").rglob("[!_]*.py")
    ),
)

# What runs code that it reads, or reads more than it was told. (Ranks of a job send each other Python
# objects, which torch.distributed pickles.)
BANNED_MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "pickletools",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "joblib",
    "runpy",
    "code",
}
BANNED_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "builtins",
    *(f"yaml.{name}" for name in ("load", "load_all", "unsafe_load", "unsafe_load_all", "full_load")),
    *(f"yaml.{name}" for name in ("full_load_all", "Loader", "UnsafeLoader", "FullLoader", "CLoader")),
    *(f"yaml.{name}" for name in ("CUnsafeLoader", "CFullLoader", "YAMLObject")),
    *(f"torch.{name}" for name in ("load", "serialization", "jit.load", "hub", "package", "export.load")),
    *(f"torch.distributed.checkpoint{name}" for name in ("", ".load", ".FileSystemReader")),
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "shutil.unpack_archive",
}
# What lies in a banned module and reads nothing: it lets torch.save leave tensors out.
HARMLESS = {"torch.serialization.skip_data"}
# Of whatever object: DeepSpeed's loads pickles, archives write where they like.
BANNED_METHODS = {"load_checkpoint", "read_pickle", "extractall", "unsafe_load", "load_state_dict_from_url"}
BANNED_ARGUMENTS = {"shell", "allow_pickle", "trust_remote_code"}  # as `=True`
DEMANDED_ARGUMENTS = {"weights_only", "local_files_only"}  # not as `=False`
# The one process that reads pickles, by allow-lists; and a writer of checkpoints that have one.
EXEMPT = {
    "convert.torch_pickle.sandbox": {"pickle", "torch.load", "torch.serialization"},
    "convert.formats.megatron.writer": {"torch.distributed.checkpoint"},
}


def module_name(path: Path) -> str:
    """model/rope.py -> model.rope; a package goes by the name of its folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def within(name: str, parent: str) -> bool:
    return not parent or name == parent or name.startswith(parent.rstrip(".") + ".")


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that is imported: `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def wrong_direction(module: str, source: str) -> list[str]:
    rule = max((name for name in MAY_IMPORT if within(module, name)), key=len, default=None)
    if rule is None:
        return [f"{module} has no entry in MAY_IMPORT"]
    problems = []
    for line, name in imports(ast.parse(source)):
        if name.startswith("."):
            problems.append(f"{module}:{line} imports {name}: write the whole name")
        if name.startswith("llama_mcore.") and name != "llama_mcore.__version__":
            target = name.removeprefix("llama_mcore.")
            if not any(within(target, allowed) for allowed in MAY_IMPORT[rule]):
                problems.append(f"{module}:{line} imports {target}")
    return problems


def beyond_border(module: str, source: str) -> list[str]:
    return [
        f"{module}:{line} imports {name}"
        for line, name in imports(ast.parse(source))
        for library, places in LIBRARY_BORDERS.items()
        if within(name, library) and not any(within(module, place) for place in places)
    ]


def impure_maths(module: str, source: str) -> list[str]:
    """Process groups, devices and other layers of the product in a file that should be arithmetic."""
    if not any(within(module, maths) for maths in MODEL_MATHS):
        return []
    tree = ast.parse(source)
    problems = [
        f"{module}:{line} imports {name}"
        for line, name in imports(tree)
        if within(name, "torch.distributed")
        or within(name, "megatron")
        or (within(name, "llama_mcore") and not within(name, "llama_mcore.model"))
    ]
    accesses = [node for node in ast.walk(tree) if dotted(node).startswith("torch.distributed")]
    return problems + [f"{module}:{node.lineno} uses torch.distributed" for node in accesses]


def names_a_device(module: str, source: str) -> list[str]:
    """`cuda` in code; docstrings and comments may speak of it."""
    if module in DEVICE_FILES:
        return []
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    problems = []
    for node in ast.walk(tree):
        text = ""
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            text = node.value if " " not in node.value else ""
        elif isinstance(node, ast.Attribute):
            text = node.attr
        if "cuda" in text.lower() and text not in FOREIGN_NAMES:
            problems.append(f"{module}:{node.lineno} says {text!r}")
    return problems


def banned(module: str, source: str) -> list[str]:
    tree = ast.parse(source)
    exempt = EXEMPT.get(module, set())
    problems = [
        f"{module}:{line} imports {name}"
        for line, name in imports(tree)
        if name not in HARMLESS
        and any(within(name, banned_name) for banned_name in (BANNED_MODULES | BANNED_CALLS) - exempt)
    ]
    aliases = {
        alias.asname: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.asname
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            problems.append(f"{module}:{node.lineno} has a global statement")
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load):
            first, dot, rest = dotted(node).partition(".")
            name = aliases.get(first, first) + dot + rest
            if name in BANNED_CALLS - exempt or (dot and name.rpartition(".")[2] in BANNED_METHODS):
                problems.append(f"{module}:{node.lineno} uses {name}")
        if isinstance(node, ast.Call):
            problems += [
                f"{module}:{node.lineno} passes {keyword.arg}"
                for keyword in node.keywords
                if _endangers(keyword.arg, keyword.value)
            ]
    return problems


def _endangers(argument: str | None, value: ast.expr) -> bool:
    constant = value.value if isinstance(value, ast.Constant) else None
    if argument in DEMANDED_ARGUMENTS:
        return constant is not True
    return argument in BANNED_ARGUMENTS and not (isinstance(value, ast.Constant) and not constant)


CHECKERS = (wrong_direction, beyond_border, impure_maths, names_a_device, banned)


@pytest.mark.parametrize("checker", CHECKERS, ids=lambda checker: checker.__name__)
def test_the_package_keeps_its_structure(checker) -> None:
    problems = [problem for path in SOURCES for problem in checker(module_name(path), path.read_text())]
    assert not problems, "\n".join(problems)


def test_scripts_run_no_code_that_they_read() -> None:
    problems = [problem for path in SCRIPTS for problem in banned(f"tools.{path.stem}", path.read_text())]
    assert not problems, "\n".join(problems)
    assert {"train", "demo", "inspect_checkpoint"} <= {path.stem for path in SCRIPTS}


def test_what_is_imported_is_required_and_nothing_else() -> None:
    trees = [ast.parse(path.read_text()) for path in (*SOURCES, *SCRIPTS)]
    modules = {name.partition(".")[0] for tree in trees for _, name in imports(tree)}
    others = modules - set(sys.stdlib_module_names) - {"llama_mcore"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {re.split(r"[^A-Za-z0-9-]", entry)[0].lower() for entry in project["dependencies"]}
    packages = {PACKAGES.get(module, module.replace("_", "-")) for module in others}
    assert packages - OPTIONAL_LIBRARIES == required - REQUIRED_BY_OTHERS


def test_all_of_the_package_was_looked_at() -> None:
    modules = {module_name(path) for path in SOURCES}
    assert {"__init__", "model.config", "distributed.device", "plan.dry_run", "model.attention"} <= modules


@pytest.mark.parametrize(
    ("checker", "module", "source"),
    [
        (wrong_direction, "model.layer", "from llama_mcore.train import trainer"),
        (wrong_direction, "model.layer", "from llama_mcore.train.trainer import train"),
        (wrong_direction, "model.config", "from llama_mcore.model.layer import Layer"),
        (wrong_direction, "plan.layout.memory", "import llama_mcore.distributed.groups"),
        (wrong_direction, "plan.layout.memory", "def f():\n    from llama_mcore.train.trainer import train"),
        (wrong_direction, "checkpoint.saver", "from llama_mcore.train.trainer import train"),
        (wrong_direction, "checkpoint.train_state", "from llama_mcore.config.run import RunConfig"),
        (wrong_direction, "train.trainer", "from llama_mcore.plan.layout.memory import model_state"),
        (wrong_direction, "model.layer", "from .config import ModelConfig"),
        (wrong_direction, "utils", "import os"),
        (beyond_border, "train.trainer", "import deepspeed"),
        (beyond_border, "train.trainer", "from deepspeed.utils import groups"),
        (beyond_border, "data.sample_order", "from megatron.core import parallel_state"),
        (beyond_border, "convert.formats.huggingface", "import megatron.core.dist_checkpointing"),
        (impure_maths, "model.rope", "import torch.distributed as dist"),
        (impure_maths, "model.rope", "from torch import distributed"),
        (impure_maths, "model.swiglu", "import torch\ntorch.distributed.all_reduce(x)"),
        (impure_maths, "model.attention.flash_backend", "from megatron.core import parallel_state"),
        (impure_maths, "model.attention.flash_backend", "from llama_mcore.distributed.device import device"),
        (names_a_device, "train.step", "x.to('cuda')"),
        (names_a_device, "train.step", "x.cuda()"),
        (names_a_device, "train.step", "torch.cuda.synchronize()"),
        (names_a_device, "train.step", "torch.device(f'cuda:{rank}')"),
        (banned, "checkpoint.loader", "import pickle"),
        (banned, "checkpoint.loader", "from cloudpickle import loads"),
        (banned, "checkpoint.loader", "import torch\ntorch.load(path)"),
        (banned, "checkpoint.loader", "from torch import load"),
        (banned, "preprocess.readers", "np.load(path, allow_pickle=True)"),
        (banned, "checkpoint.loader", "import torch as t\nt.load(path)"),
        (banned, "checkpoint.loader", "import torch\nread = torch.load"),
        (banned, "checkpoint.loader", "import torch\ntorch.serialization.load(path)"),
        (banned, "checkpoint.loader", "from torch.serialization import load"),
        (banned, "checkpoint.loader", "import torch\ntorch.jit.load(path)"),
        (banned, "checkpoint.loader", "from torch.distributed.checkpoint import load"),
        (banned, "convert.formats.megatron.writer", "from torch.distributed.checkpoint import load"),
        (banned, "convert.formats.megatron.writer", "import pickle"),
        (banned, "convert.torch_pickle.sandbox", "torch.load(path, weights_only=False)"),
        (banned, "checkpoint.loader", "engine.load_checkpoint(path)"),
        (banned, "checkpoint.loader", "frame = pandas.read_pickle(path)"),
        (banned, "checkpoint.loader", "read(path, weights_only=False)"),
        (banned, "checkpoint.loader", "from numpy import load\nload(path, allow_pickle=flag)"),
        (banned, "checkpoint.loader", "import _pickle"),
        (banned, "preprocess.readers", "zipfile.ZipFile(path).extractall(folder)"),
        (banned, "preprocess.readers", "import shutil\nshutil.unpack_archive(path)"),
        (banned, "generate.generate", "AutoTokenizer.from_pretrained(path, trust_remote_code=True)"),
        (banned, "config.run", "import yaml as y\ny.load(text, Loader=y.SafeLoader)"),
        (banned, "config.run", "yaml.load_all(text, yaml.SafeLoader)"),
        (banned, "config.run", "from yaml import UnsafeLoader"),
        (banned, "config.run", "class Loader(yaml.FullLoader): pass"),
        (banned, "config.run", "yaml.load(text)"),
        (banned, "launch.slurm", "subprocess.run(line, shell=True)"),
        (banned, "launch.slurm", "subprocess.run(line, shell=flag)"),
        (banned, "launch.slurm", "subprocess.getstatusoutput(line)"),
        (banned, "train.trainer", "import builtins"),
        (banned, "train.trainer", "run = eval"),
        (banned, "train.trainer", "eval('1')"),
        (banned, "train.trainer", "exec('1')"),
        (banned, "train.trainer", "def f():\n    global state\n    state = 1"),
    ],
)
def test_a_bad_source_is_found(checker, module: str, source: str) -> None:
    assert checker(module, source)


@pytest.mark.parametrize(
    ("checker", "module", "source"),
    [
        (wrong_direction, "train.trainer", "from llama_mcore.checkpoint.saver import save"),
        (wrong_direction, "checkpoint.saver", "from llama_mcore.checkpoint.train_state import TrainState"),
        (beyond_border, "model.spec", "from megatron.core.transformer import TransformerConfig"),
        (beyond_border, "checkpoint.saver", "from deepspeed import DeepSpeedEngine"),
        (impure_maths, "model.rope", "import torch\nfrom llama_mcore.model.config import ModelConfig"),
        (names_a_device, "train.step", '"""Runs on cuda and elsewhere."""\n# cuda is fine here'),
        (names_a_device, "distributed.device", "torch.device('cuda')"),
        (banned, "convert.torch_pickle.sandbox", "import pickle\ntorch.load(path, weights_only=True)"),
        (banned, "convert.formats.megatron.writer", "from torch.distributed.checkpoint.metadata import A"),
        (banned, "config.run", "yaml.safe_load(text)"),
        (banned, "config.run", "class PlainLoader(yaml.SafeLoader): pass"),
        (
            banned,
            "checkpoint.loader",
            "load_checkpoint(engine, reader, groups)\nread(path, weights_only=True)",
        ),
        (banned, "model.rope", "model = torch.compile(model)"),
        (banned, "preprocess.readers", "re.compile('a')\nsubprocess.run(words, shell=False)"),
    ],
)
def test_a_good_source_passes(checker, module: str, source: str) -> None:
    assert not checker(module, source)


def loaded_by(statement: str) -> set[str]:
    """Top-level names in sys.modules of a fresh interpreter that runs `statement`."""
    code = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    return set(result.stdout.splitlines()[-1].split())


@pytest.mark.process
def test_configuration_and_planning_load_no_torch() -> None:
    statement = "\n".join(f"import llama_mcore.{module}" for module in WITHOUT_TORCH)
    assert not loaded_by(statement) & {"torch", "deepspeed", "megatron", "numpy"}


@pytest.mark.process
def test_help_loads_nothing_heavy() -> None:
    loaded = loaded_by("from llama_mcore.cli import app\ntry: app(['--help'])\nexcept SystemExit: pass")
    assert "typer" in loaded
    assert not loaded & {"torch", "deepspeed", "megatron", "numpy", "pydantic", "yaml", "matplotlib"}


@pytest.mark.process
def test_torch_is_seen_when_it_is_loaded() -> None:
    assert "numpy" in loaded_by("import numpy")


@pytest.mark.parametrize("importer", ["cli/commands.py", "cli/start_run.py"])
def test_the_command_line_calls_functions_that_exist(importer: str) -> None:
    tree = ast.parse((PACKAGE / importer).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("llama_mcore."):
            place = PACKAGE / Path(*node.module.split(".")[1:])
            path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
            assert path.is_file(), f"{importer} imports {node.module}"
            body = ast.parse(path.read_text()).body
            defined = {getattr(item, "name", "") for item in body}
            defined |= {
                dotted(target) for item in body if isinstance(item, ast.Assign) for target in item.targets
            }
            defined |= {module.stem for module in place.glob("*.py")}
            assert {alias.name for alias in node.names} <= defined, (
                f"{path.name} lacks what {importer} imports"
            )
