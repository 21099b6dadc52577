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

BASE = {"errors", "section", "small_file", "units"}
CONFIGURED = ("model", "parallel", "data", "train", "checkpoint", "observe", "launch")
CONFIGS = {f"{package}.config" for package in CONFIGURED} | {"model.parameters"}

# Module, or package with all in it -> what of llama_mcore it may import. The longest name that fits decides.
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),
    "installed": set(),
    "errors": set(),
    "section": set(),
    "small_file": set(),
    "units": {"errors"},
    "config": BASE | CONFIGS,
    "model": BASE | {"model", "parallel"},
    "parallel": BASE | {"parallel"},
    "data": BASE | {"data"},
    "picture": {"data.files"},
    "observe": BASE | {"observe", "picture"},
    # train.state is records without behaviour: what a checkpoint stores beside the tensors.
    "checkpoint": BASE | {"checkpoint", "model", "parallel", "data", "observe", "config", "train.state"},
    "train": BASE | {"train", "model", "parallel", "data", "checkpoint", "observe", "config"},
    "train.state": {"data.ledger", "section"},
    # Decides by numbers alone: no tensor, no clock, no file.
    "train.health": {"train.config", "train.state"},
    "plan": BASE | CONFIGS | {"plan", "config", "picture", "parallel.ds_file"},
    # A plan ends in the job script of `llama-mcore slurm`.
    "plan.layout_run": BASE | CONFIGS | {"plan", "config", "launch.slurm", "data.files"},
    "train.utilization": {"config", "plan.flops", "plan.hardware"},
    "launch": BASE | CONFIGS | {"launch", "plan", "observe", "config"},
    # What the doctor says of backends and devices it asks them.
    "launch.backends": {"errors", "launch", "model", "parallel.device"},
    "launch.smoke": {"errors", "launch", "model", "parallel.device"},
    "launch.gpus": {"errors", "launch", "parallel.device"},
    "launch.limits": {"errors", "launch", "units", "parallel.cgroup"},
    "launch.signs": {"errors", "launch", "parallel.rank"},
    "launch.loopback": {"errors", "launch", "parallel.device"},
    # What they say to the process that trains, in words of its own.
    "launch.patience": {"launch.config", "observe.phases"},
    "launch.heartbeat": {"launch.patience", "observe.phases"},
    "launch.supervisor": {
        *("errors", "launch", "observe.lives", "observe.phases", "parallel.rank", "train.signals"),
        "checkpoint.lease",
    },
    "launch.progress": {"errors", "observe.lives"},
    "launch.torchrun": {
        *("errors", "launch", "parallel.meeting", "parallel.rank", "parallel.store", "train.signals"),
    },
    "launch.rank_on_host": {"parallel.rank"},
    "launch.doctor": {"errors", "launch", "parallel.device"},
    "launch.all_reduce": {"parallel.device"},
    # It looks at what a run will look at, with the same functions.
    "launch.run_checks": {
        *("errors", "units", "launch", "config", "data", "plan.summary"),
        *("checkpoint.layout", "checkpoint.lease", "checkpoint.start"),
    },
    "launch.node_checks": {
        *("errors", "units", "launch", "config", "plan", "model", "parallel.cgroup", "parallel.device"),
        "checkpoint.run_folder",
    },
    "launch.limited": set(),
    "launch.versions": {"parallel.device", "small_file"},
    "launch.preflight": {"errors", "launch", "config", "parallel", "train.alike"},
    # Checks a run as `train --dry-run` does, and writes a file whole or not at all.
    "launch.slurm": {
        *("errors", "units", "config", "train.ds_config", "data.files", "launch.run_checks"),
    },
    "benchmark": BASE
    | {"benchmark", "train", "model", "parallel", "data", "checkpoint", "observe", "plan", "config"},
    "generate": BASE | {"model", "parallel", "data", "checkpoint", "observe", "config"},
    "cli": {""},  # everything
    "start_run": {""},
    **dict.fromkeys(CONFIGS, BASE | CONFIGS),
}

# Library -> where it may be imported.
LIBRARY_BORDERS = {
    "megatron": ("model.", "parallel.", "data.indexed", "checkpoint.convert.megatron"),
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
DEVICE_FILES = ("parallel.device", "parallel.mcore_cpu", "config", "launch.gpus", "launch.environment")
WITHOUT_TORCH = (
    *sorted(CONFIGS),
    "errors",
    "section",
    "config",
    "cli",
    "parallel.rank",
    "launch.progress",
    "launch.slurm",
    "launch.supervisor",
    "observe.lives",
    *sorted(f"plan.{path.stem}" for path in (PACKAGE / "plan").glob("[!_]*.py")),
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
    "checkpoint.convert.pickled_child": {"pickle", "torch.load", "torch.serialization"},
    "checkpoint.convert.megatron_writer": {"torch.distributed.checkpoint"},
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
    assert {"__init__", "model.config", "parallel.device", "plan.summary", "model.attention"} <= modules


@pytest.mark.parametrize(
    ("checker", "module", "source"),
    [
        (wrong_direction, "model.layer", "from llama_mcore.train import loop"),
        (wrong_direction, "model.layer", "from llama_mcore.train.loop import train"),
        (wrong_direction, "model.config", "from llama_mcore.model.layer import Layer"),
        (wrong_direction, "plan.memory", "import llama_mcore.parallel.groups"),
        (wrong_direction, "plan.memory", "def f():\n    from llama_mcore.train.loop import train"),
        (wrong_direction, "checkpoint.save", "from llama_mcore.train.loop import train"),
        (wrong_direction, "train.state", "from llama_mcore.config import RunConfig"),
        (wrong_direction, "train.loop", "from llama_mcore.plan.memory import model_state"),
        (wrong_direction, "model.layer", "from .config import ModelConfig"),
        (wrong_direction, "utils", "import os"),
        (beyond_border, "train.loop", "import deepspeed"),
        (beyond_border, "train.loop", "from deepspeed.utils import groups"),
        (beyond_border, "data.order", "from megatron.core import parallel_state"),
        (beyond_border, "checkpoint.convert.hf", "import megatron.core.dist_checkpointing"),
        (impure_maths, "model.rope", "import torch.distributed as dist"),
        (impure_maths, "model.rope", "from torch import distributed"),
        (impure_maths, "model.swiglu", "import torch\ntorch.distributed.all_reduce(x)"),
        (impure_maths, "model.attention.flash_backend", "from megatron.core import parallel_state"),
        (impure_maths, "model.attention.flash_backend", "from llama_mcore.parallel.device import device"),
        (names_a_device, "train.step", "x.to('cuda')"),
        (names_a_device, "train.step", "x.cuda()"),
        (names_a_device, "train.step", "torch.cuda.synchronize()"),
        (names_a_device, "train.step", "torch.device(f'cuda:{rank}')"),
        (banned, "checkpoint.load", "import pickle"),
        (banned, "checkpoint.load", "from cloudpickle import loads"),
        (banned, "checkpoint.load", "import torch\ntorch.load(path)"),
        (banned, "checkpoint.load", "from torch import load"),
        (banned, "data.readers", "np.load(path, allow_pickle=True)"),
        (banned, "checkpoint.load", "import torch as t\nt.load(path)"),
        (banned, "checkpoint.load", "import torch\nread = torch.load"),
        (banned, "checkpoint.load", "import torch\ntorch.serialization.load(path)"),
        (banned, "checkpoint.load", "from torch.serialization import load"),
        (banned, "checkpoint.load", "import torch\ntorch.jit.load(path)"),
        (banned, "checkpoint.load", "from torch.distributed.checkpoint import load"),
        (banned, "checkpoint.convert.megatron_writer", "from torch.distributed.checkpoint import load"),
        (banned, "checkpoint.convert.megatron_writer", "import pickle"),
        (banned, "checkpoint.convert.pickled_child", "torch.load(path, weights_only=False)"),
        (banned, "checkpoint.load", "engine.load_checkpoint(path)"),
        (banned, "checkpoint.load", "frame = pandas.read_pickle(path)"),
        (banned, "checkpoint.load", "read(path, weights_only=False)"),
        (banned, "checkpoint.load", "from numpy import load\nload(path, allow_pickle=flag)"),
        (banned, "checkpoint.load", "import _pickle"),
        (banned, "data.readers", "zipfile.ZipFile(path).extractall(folder)"),
        (banned, "data.readers", "import shutil\nshutil.unpack_archive(path)"),
        (banned, "generate", "AutoTokenizer.from_pretrained(path, trust_remote_code=True)"),
        (banned, "config", "import yaml as y\ny.load(text, Loader=y.SafeLoader)"),
        (banned, "config", "yaml.load_all(text, yaml.SafeLoader)"),
        (banned, "config", "from yaml import UnsafeLoader"),
        (banned, "config", "class Loader(yaml.FullLoader): pass"),
        (banned, "config", "yaml.load(text)"),
        (banned, "launch.slurm", "subprocess.run(line, shell=True)"),
        (banned, "launch.slurm", "subprocess.run(line, shell=flag)"),
        (banned, "launch.slurm", "subprocess.getstatusoutput(line)"),
        (banned, "train.loop", "import builtins"),
        (banned, "train.loop", "run = eval"),
        (banned, "train.loop", "eval('1')"),
        (banned, "train.loop", "exec('1')"),
        (banned, "train.loop", "def f():\n    global state\n    state = 1"),
    ],
)
def test_a_bad_source_is_found(checker, module: str, source: str) -> None:
    assert checker(module, source)


@pytest.mark.parametrize(
    ("checker", "module", "source"),
    [
        (wrong_direction, "train.loop", "from llama_mcore.checkpoint.save import save"),
        (wrong_direction, "checkpoint.save", "from llama_mcore.train.state import TrainState"),
        (beyond_border, "model.spec", "from megatron.core.transformer import TransformerConfig"),
        (beyond_border, "checkpoint.save", "from deepspeed import DeepSpeedEngine"),
        (impure_maths, "model.rope", "import torch\nfrom llama_mcore.model.config import ModelConfig"),
        (names_a_device, "train.step", '"""Runs on cuda and elsewhere."""\n# cuda is fine here'),
        (names_a_device, "parallel.device", "torch.device('cuda')"),
        (banned, "checkpoint.convert.pickled_child", "import pickle\ntorch.load(path, weights_only=True)"),
        (banned, "checkpoint.convert.megatron_writer", "from torch.distributed.checkpoint.metadata import A"),
        (banned, "config", "yaml.safe_load(text)"),
        (banned, "config", "class PlainLoader(yaml.SafeLoader): pass"),
        (banned, "checkpoint.load", "load_checkpoint(engine, reader, groups)\nread(path, weights_only=True)"),
        (banned, "model.rope", "model = torch.compile(model)"),
        (banned, "data.readers", "re.compile('a')\nsubprocess.run(words, shell=False)"),
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


@pytest.mark.parametrize("importer", ["cli.py", "start_run.py"])
def test_the_command_line_calls_functions_that_exist(importer: str) -> None:
    tree = ast.parse((PACKAGE / importer).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("llama_mcore."):
            path = PACKAGE / Path(*node.module.split(".")[1:]).with_suffix(".py")
            assert path.is_file(), f"{importer} imports {node.module}"
            body = ast.parse(path.read_text()).body
            defined = {getattr(item, "name", "") for item in body}
            defined |= {
                dotted(target) for item in body if isinstance(item, ast.Assign) for target in item.targets
            }
            assert {alias.name for alias in node.names} <= defined, (
                f"{path.name} lacks what {importer} imports"
            )
