"""Import contracts and banned calls of pyproject.toml, each seen to fail once, and what neither can say."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.world import ROOT, TIMEOUT_S

PACKAGE = ROOT / "llama_mcore"
SOURCES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted((ROOT / "tools").glob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LINT_IMPORTS = "from importlinter.cli import lint_imports_command; lint_imports_command()"

# Contract, by its first words -> a module and an import that breaks it.
FORBIDDEN_IMPORTS = {
    "Each layer": ("model/rope.py", "llama_mcore.data.index"),
    "A package's section": ("model/config.py", "llama_mcore.model.layer"),
    "No cycles": ("data/index.py", "llama_mcore.data.indexed_dataset"),
    "Configuration, planning": ("plan/dry_run.py", "torch"),
    "Preparing text": ("preprocess/pool.py", "llama_mcore.model.rope"),
    "Training is imported": ("convert/convert.py", "llama_mcore.train.step"),
    "megatron-core": ("data/index.py", "megatron"),
    "DeepSpeed": ("train/trainer.py", "deepspeed"),
    "Model maths": ("model/swiglu.py", "llama_mcore.distributed.groups"),
    "Health decides": ("train/health.py", "time"),
}
FORBIDDEN_CALLS = [
    *("import pickle", "from cloudpickle import loads", "import _pickle", "import builtins"),
    *("import torch as t\nt.load(a)", "import torch\nread = torch.load", "from torch import load"),
    *("from torch.serialization import load", "import torch\ntorch.jit.load(a)"),
    *("from torch.distributed.checkpoint import load", "from yaml import UnsafeLoader"),
    *("import yaml as y\ny.load(a, y.SafeLoader)", "import yaml\nclass Loader(yaml.FullLoader): ..."),
    *("import subprocess\nsubprocess.run(a, shell=True)", "import subprocess\nsubprocess.getoutput(a)"),
    *("import os\nos.system(a)", "import shutil\nshutil.unpack_archive(a)", "eval('1')", "exec('1')"),
    *("def f():\n    global a\n    a = 1", "from . import model"),
]

# Of whatever object: DeepSpeed's loads pickles, archives write where they like.
BANNED_METHODS = {"load_checkpoint", "read_pickle", "extractall", "unsafe_load", "load_state_dict_from_url"}
BANNED_NAMES = {"eval", "exec", "compile", "__import__"}  # ruff sees calls of the first two alone
FALSE_ARGUMENTS = {"shell", "allow_pickle", "trust_remote_code"}
TRUE_ARGUMENTS = {"weights_only", "local_files_only"}

MATHS = ["precision", "rope", "swiglu", "attention"]  # import-linter knows torch as a whole
# Two place tensors, one has the setting, one describes a machine.
DEVICE_MODULES = {"distributed.device", "distributed.mcore_cpu", "config.schema", "diagnose.gpus"}
FOREIGN_NAMES = {"fused_layer_norm_cuda", "CudaGraphModule", "CudaGraphScope", "InferenceCudaGraphScope"}

DISTRIBUTIONS = {"yaml": "pyyaml", "megatron": "megatron-core"}
# What a user may leave out: the extras, and what is built from its source.
OPTIONAL = {"transformers", "flash-attn", "xformers", "transformer-engine"}
# torch writes TensorBoard's events with the one, SentencePiece reads its models with the other.
NEEDED_BY_OTHERS = {"tensorboard", "protobuf"}


def module_name(path: Path) -> str:
    """model/rope.py -> model.rope."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def unsafe_code(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in BANNED_METHODS:
            found.append(f"{node.lineno}: .{node.attr}")
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in BANNED_NAMES:
            found.append(f"{node.lineno}: {node.id}")
        for argument in node.keywords if isinstance(node, ast.Call) else ():
            value = argument.value.value if isinstance(argument.value, ast.Constant) else None
            if (argument.arg in FALSE_ARGUMENTS and value is not False) or (
                argument.arg in TRUE_ARGUMENTS and value is not True
            ):
                found.append(f"{node.lineno}: {argument.arg}")
    return found


def device_names(source: str) -> list[str]:
    """`cuda` in code; docstrings, comments, messages and environment variables may have it."""
    nodes = list(ast.walk(ast.parse(source)))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    words = [(node, node.attr) for node in nodes if isinstance(node, ast.Attribute)]
    words += [
        (node, node.value)
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    ]
    return [
        f"{node.lineno}: {word}"
        for node, word in words
        if "cuda" in word.lower() and " " not in word and not word.isupper() and word not in FOREIGN_NAMES
    ]


def test_nothing_runs_code_that_it_reads() -> None:
    found = {path.name: unsafe_code(path.read_text()) for path in (*SOURCES, *SCRIPTS)}
    assert not {name: uses for name, uses in found.items() if uses}


@pytest.mark.parametrize(
    "source",
    [
        *("engine.load_checkpoint(a)", "pandas.read_pickle(a)", "zipfile.ZipFile(a).extractall(b)"),
        *("run(a, shell=flag)", "load(a, allow_pickle=True)", "read(a, weights_only=False)"),
        *("AutoTokenizer.from_pretrained(a, trust_remote_code=True)", "run = eval", "__import__(a)"),
    ],
)
def test_unsafe_code_is_found(source: str) -> None:
    assert unsafe_code(source)


def test_safe_code_passes() -> None:
    assert not unsafe_code("load(engine)\nread(a, weights_only=True)\nre.compile(a)\nrun(a, shell=False)")


def test_devices_are_named_in_one_module() -> None:
    found = {module_name(path): device_names(path.read_text()) for path in SOURCES}
    assert not {name: uses for name, uses in found.items() if uses and name not in DEVICE_MODULES}


@pytest.mark.parametrize("source", ["x.to('cuda')", "x.cuda()", "torch.device(f'cuda:{rank}')"])
def test_a_device_name_is_found(source: str) -> None:
    assert device_names(source)


@pytest.mark.parametrize("maths", MATHS)
def test_model_maths_uses_no_collective(maths: str) -> None:
    place = PACKAGE / "model" / maths
    for path in place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")]:
        assert "torch.distributed" not in path.read_text()


def test_what_is_imported_is_required_and_nothing_else() -> None:
    nodes = [node for path in (*SOURCES, *SCRIPTS) for node in ast.walk(ast.parse(path.read_text()))]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    names = {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - {"llama_mcore"}
    imported = {DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in names}
    required = {re.split(r"[^\w-]", entry)[0].lower() for entry in PROJECT["project"]["dependencies"]}
    assert imported - OPTIONAL == required - NEEDED_BY_OTHERS


def output_of(*arguments: str, cwd: Path = ROOT) -> str:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT_S).stdout


@pytest.fixture(scope="module")
def broken_contracts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Report of import-linter on a copy of the package in which every contract is broken."""
    copy = tmp_path_factory.mktemp("broken")
    shutil.copytree(PACKAGE, copy / "llama_mcore", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    for path, module in FORBIDDEN_IMPORTS.values():
        with (copy / "llama_mcore" / path).open("a") as file:
            file.write(f"import {module}\n")
    return output_of("-c", LINT_IMPORTS, "--no-cache", cwd=copy)


@pytest.mark.process
@pytest.mark.parametrize("name", [c["name"] for c in PROJECT["tool"]["importlinter"]["contracts"]])
def test_an_import_contract_can_fail(name: str, broken_contracts: str) -> None:
    (module,) = {module for start, (_, module) in FORBIDDEN_IMPORTS.items() if name.startswith(start)}
    assert f"{name} BROKEN" in broken_contracts
    assert module.rpartition(".")[2] in broken_contracts.rpartition(f"{name}\n---")[2].partition("\n---")[0]


@pytest.mark.process
def test_ruff_refuses_banned_calls(tmp_path: Path) -> None:
    for number, source in enumerate(FORBIDDEN_CALLS):
        (tmp_path / f"{number}.py").write_text(source)
    options = ("--config", str(ROOT / "pyproject.toml"), "--output-format", "concise", "--no-cache")
    found = output_of("-m", "ruff", "check", "--select", "S,TID25,PLW0603", *options, str(tmp_path))
    assert set(re.findall(r"(\d+)\.py:", found)) == {str(number) for number in range(len(FORBIDDEN_CALLS))}


def loaded_by(statement: str) -> set[str]:
    """Top-level modules of a fresh interpreter that runs `statement`."""
    code = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(output_of("-c", code).splitlines()[-1].split())


@pytest.mark.process
def test_help_loads_nothing_heavy() -> None:
    loaded = loaded_by("from llama_mcore.cli import app\ntry: app(['--help'])\nexcept SystemExit: pass")
    assert "typer" in loaded
    assert not loaded & {"torch", "deepspeed", "megatron", "numpy", "pydantic", "yaml", "matplotlib"}


@pytest.mark.process
def test_commands_load_no_torch_before_they_run() -> None:
    modules = [f"llama_mcore.cli.{path.stem}" for path in (PACKAGE / "cli").glob("[!_]*.py")]
    loaded = loaded_by(f"import llama_mcore, llama_mcore.launch.slurm, {', '.join(modules)}")
    assert not loaded & {"torch", "deepspeed", "megatron", "numpy"}
