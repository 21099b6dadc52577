"""llama_mcore.diagnose.doctor and what it is made of: real runs of the command, real faults."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from llama_mcore.diagnose import machine, software
from llama_mcore.diagnose.allreduce import end_together, loopback
from llama_mcore.diagnose.backends import attention_backends, kernels, to_test
from llama_mcore.diagnose.doctor import as_json_text, as_text
from llama_mcore.diagnose.finding import Finding
from llama_mcore.diagnose.gpus import bf16_on_cpu
from llama_mcore.diagnose.machine import environment
from llama_mcore.diagnose.smoke import Outcome
from llama_mcore.distributed.cgroup import cpu_limit, memory_limit
from tests.support.errors import is_shown
from tests.support.product import launched_environment, run_command
from tests.support.world import ROOT, TIMEOUT_S, Call, exit_codes_of, wait_until

GIB = 1 << 30


def module(folder: Path, name: str, source: str) -> None:
    (folder / f"{name}.py").write_text(source)


def distribution(folder: Path, name: str, version: str, *headers: str) -> None:
    """Metadata as pip leaves it."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *headers]
    (info / "METADATA").write_text("\n".join(lines) + "\n")


def environment_with(path: Path, **variables: str) -> dict[str, str]:
    """Environment in which the modules and metadata in `path` come before the installed ones."""
    return launched_environment() | variables | {"PYTHONPATH": f"{path}{os.pathsep}{ROOT}"}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, object]]:
    """Findings by group and name, where nothing is wrong but optional packages and a few variables."""
    folder = tmp_path_factory.mktemp("path")
    module(folder, "flash_attn", "raise ImportError('undefined symbol')")
    module(folder, "xformers", "print('hello')\nraise SystemExit('no kernel\\nfor you')")
    job = Call(exit_codes_of, 1, doctor, environment_with(folder, NCCL_IB_DISABLE="1"), folder)
    assert job.result() == [0], job.output
    report = json.loads(job.output)
    assert report["ok"] is True
    return {(finding["group"], finding["name"]): finding for finding in report["findings"]}


def doctor(environment: dict[str, str], path: Path) -> None:
    """The command, in a process that has imported the large libraries."""
    os.environ.update(environment)
    sys.path.insert(0, str(path))
    for name in ("flash_attn", "xformers"):  # megatron-core imports those that it finds
        sys.modules.pop(name, None)
    run_command(["doctor", "--json"])


@pytest.mark.process
def test_everything_that_was_asked_for_is_there(healthy) -> None:
    assert {group for group, _ in healthy} == {
        "required packages",
        "optional packages",
        "devices",
        "attention",
        "kernels",
        "collectives",
        "limits",
        "programs",
        "environment",
    }
    required = {name for group, name in healthy if group == "required packages"}
    assert {"Python", "torch", "megatron-core", "deepspeed", "tensorboard"} <= required
    optional = {"transformers", "flash-attn", "xformers", "transformer-engine", "apex", "triton"}
    assert optional == {name for group, name in healthy if group == "optional packages"}


@pytest.mark.process
def test_the_keys_of_json_are_stable(healthy) -> None:
    keys = {"group", "name", "status", "value", "meaning", "remedy", "required"}
    assert all(set(finding) == keys for finding in healthy.values())
    assert {finding["status"] for finding in healthy.values()} <= {"ok", "note", "missing", "problem"}


@pytest.mark.process
def test_what_is_missing_or_a_problem_has_a_meaning_and_a_remedy(healthy) -> None:
    for finding in healthy.values():
        if finding["status"] in ("missing", "problem"):
            assert finding["meaning"], finding
            assert finding["remedy"], finding


@pytest.mark.process
def test_a_broken_optional_package_is_a_problem_with_its_reason(healthy) -> None:
    flash, xformers = (healthy["optional packages", name] for name in ("flash-attn", "xformers"))
    assert (flash["status"], xformers["status"]) == ("problem", "problem")
    assert "ImportError: undefined symbol" in str(flash["meaning"])
    assert "SystemExit: no kernel\\nfor you" in str(xformers["meaning"])


@pytest.mark.process
def test_the_loopback_measures_a_bandwidth(healthy) -> None:
    found = healthy["collectives", "gloo loopback"]
    assert found["required"] is True
    assert 0.001 < float(str(found["value"]).removesuffix(" GB/s")) < 1000


@pytest.mark.process
def test_a_variable_that_slows_a_run_is_a_problem_but_stops_none(healthy) -> None:
    assert healthy["environment", "NCCL_IB_DISABLE"]["status"] == "problem"


@pytest.mark.process
def test_broken_and_wrong_required_packages_end_it_with_all_problems(tmp_path) -> None:
    module(tmp_path, "torch", "raise ImportError('libcudart.so.99: cannot open')")
    module(tmp_path, "xformers", "raise ImportError")
    distribution(tmp_path, "numpy", "1.26.4")
    command = [sys.executable, "-m", "llama_mcore.cli", "doctor"]
    done = subprocess.run(
        command, env=environment_with(tmp_path), capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 69
    assert "Traceback" not in done.stderr
    assert is_shown(done.stderr, "torch")
    assert "libcudart.so.99" in done.stderr
    assert is_shown(done.stderr, "numpy", "1.26.4")
    assert "a training run cannot start" in done.stdout
    assert "open files" in done.stdout


@pytest.mark.process
def test_a_network_that_does_not_exist_is_named() -> None:
    found = loopback(2, launched_environment() | {"GLOO_SOCKET_IFNAME": "nosuch0"})
    assert found.stops_training
    assert "nosuch0" in found.value


@pytest.mark.process
def test_ranks_that_hang_are_killed(tmp_path) -> None:
    source = """
import os, time
from pathlib import Path
folder, forks = Path({!r}), []

def hang():
    (folder / f"{{os.getpid()}}.pid").touch()
    time.sleep(600)

def wait_for_it():
    forks.append(1)
    while len(list(folder.glob("*.pid"))) < len(forks):
        time.sleep(0.01)

os.register_at_fork(after_in_parent=wait_for_it, after_in_child=hang)
"""
    module(tmp_path, "sitecustomize", source.format(str(tmp_path)))
    found = loopback(2, environment_with(tmp_path), limit_s=0.5)
    assert found.stops_training
    assert "hung for 0.5 s" in found.value
    ranks = [int(path.stem) for path in tmp_path.glob("*.pid")]
    assert len(ranks) == 2
    wait_until(lambda: not any(map(is_alive, ranks)))


@pytest.mark.process
def test_a_start_that_hangs_is_killed_with_all_it_started(tmp_path) -> None:
    """A process that it forks at its very start hangs, as a rank would."""
    pid, start_s = tmp_path / "pid", 0.5
    source = "import os, time\nif os.fork() == 0:\n    os.close(2)\n    with open({!r}, 'w') as file:\n"
    source += "        file.write(str(os.getpid()))\ntime.sleep(600)"
    module(tmp_path, "sitecustomize", source.format(str(pid)))
    while not (pid.exists() and pid.read_text()):  # a crowded machine may be slow to come so far
        start_s *= 2
        found = loopback(2, environment_with(tmp_path), limit_s=0.5, start_s=start_s)
        assert found.stops_training
        assert f"did not end within {start_s + 0.5:g} s" in found.value
    wait_until(lambda: not is_alive(int(pid.read_text())))


@pytest.mark.process
def test_a_rank_that_dies_ends_the_loopback_at_once(tmp_path) -> None:
    source = "import os\nforks = []\nsecond = lambda: len(forks) == 2 and os._exit(7)\n"
    source += "os.register_at_fork(before=lambda: forks.append(1), after_in_child=second)"
    module(tmp_path, "sitecustomize", source)
    found = loopback(2, environment_with(tmp_path), limit_s=TIMEOUT_S)
    assert found.value == "failed: ranks ended with [-9, 7]"


class Ended:
    """A process that ends: the end shows in its sentinel first, then in is_alive, then in its exit code."""

    def __init__(self, exit_code: int | None) -> None:
        self.sentinel, self._other_end = os.pipe()
        self._looks, self.exitcode = 0, None
        self._exit_code = exit_code
        if exit_code is not None:
            os.close(self._other_end)

    def is_alive(self) -> bool:
        self._looks += 1
        if self._exit_code is not None and self._looks > 1:
            self.exitcode = self._exit_code
        return self.exitcode is None

    def kill(self) -> None:
        self.exitcode = -9

    def join(self) -> None:
        pass


def test_a_rank_whose_exit_code_comes_late_ends_the_others() -> None:
    with pytest.raises(SystemExit, match=r"ranks ended with \[-9, 7\]"):
        end_together([Ended(None), Ended(7)], limit_s=1.0)


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("text", "pins", "status"),
    [
        ("packaging>=1", {}, "ok"),
        ("packaging>=1", {"packaging": "0.1"}, "note"),
        ("packaging<1", {}, "problem"),
        ("no-such-package>=1", {}, "missing"),
    ],
)
def test_a_required_package(text: str, pins: dict[str, str], status: str) -> None:
    found = software.required_package(Requirement(text), pins)
    assert (found.status, found.required) == (status, True)


def test_python_must_be_in_the_range_of_the_metadata(monkeypatch, tmp_path) -> None:
    """The range in a clone's pyproject.toml, if there is one; else that of what is installed."""
    distribution(tmp_path, "llama_mcore", "9.9", "Requires-Python: <3")
    monkeypatch.syspath_prepend(tmp_path)
    assert software.python_and_packages()[0].status == "ok"
    monkeypatch.setattr(software, "CLONE", tmp_path)
    (python,) = software.python_and_packages()
    assert python.stops_training
    assert python.meaning == "too new: must be <3"


def test_without_metadata_nothing_is_refused(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(software, "CLONE", tmp_path)
    monkeypatch.setattr(software, "PRODUCT", "no-such-package")
    product, *others = software.python_and_packages()
    assert (product.status, product.stops_training) == ("note", False)
    assert "cannot be checked" in product.meaning
    assert {found.name: found.status for found in others} == dict.fromkeys(software.ESSENTIAL, "ok")


def test_the_pyproject_of_another_project_says_nothing(tmp_path) -> None:
    text = '[project]\nname = "{}"\nrequires-python = ">=3"\ndependencies = ["torch>=2"]\n'
    (tmp_path / "pyproject.toml").write_text(text.format("other"))
    assert software.demands_of_clone(tmp_path) is None
    (tmp_path / "pyproject.toml").write_text(text.format("llama-mcore"))
    assert software.demands_of_clone(tmp_path) == software.Demands(">=3", ("torch>=2",))


@pytest.mark.parametrize(
    ("version", "fault"),
    [
        ("2.10.1", "too old"),
        ("2.11.0", ""),
        ("2.11.0+cu130", ""),
        ("2.13.1", ""),
        ("2.14.0", "too new"),
        ("2.11.0a0+git1", "too old"),
        ("2.12.0a0+git1", ""),
    ],
)
def test_a_version_out_of_range_is_too_old_or_too_new(version: str, fault: str) -> None:
    assert software.misfit(SpecifierSet(">=2.11,<2.14"), version).partition(":")[0] == fault


def test_a_module_without_metadata_is_there_all_the_same(monkeypatch, tmp_path) -> None:
    module(tmp_path, "no_such_package", "")
    monkeypatch.syspath_prepend(tmp_path)
    found = software.required_package(Requirement("no-such-package>=1"), {})
    assert (found.status, found.value) == ("note", "version unknown")


def test_the_tested_versions_are_read(tmp_path: Path) -> None:
    """Versions for this Python, of packages that have one for each."""
    pins = tmp_path / "pins.txt"
    old, new = (f'megatron-core=={n}.0; python_version {c} "3"  # why' for n, c in ((1, "<"), (2, ">=")))
    pins.write_text(f"# exactly\n{new}\n{old}\nPyYAML==6.0.3\n")
    assert software.tested_versions(pins) == {"megatron-core": "2.0", "pyyaml": "6.0.3"}
    assert software.tested_versions(ROOT / "nowhere.txt") == {}


def test_every_required_package_has_a_tested_version() -> None:
    demands = software.demands_of_clone(ROOT)
    assert demands is not None
    pins = software.tested_versions(ROOT / "requirements.txt")
    required = [one for one in map(Requirement, demands.packages) if software.applies(one)]
    outside = [one.name for one in required if pins[canonicalize_name(one.name)] not in one.specifier]
    assert not outside


def test_another_project_called_apex_is_a_problem() -> None:
    package = software.Optional("packaging", ("no_such_extension",), "costs", "build it")
    found = software.optional_package("packaging", package)
    assert found.status == "problem"
    assert "no_such_extension" in found.meaning


def test_programs_that_are_not_there() -> None:
    assert {found.status for found in software.programs(which=lambda name: None)} == {"missing"}
    assert {found.value for found in software.programs(which=lambda name: f"/bin/{name}")} >= {"/bin/srun"}


def all_pass() -> dict[str, Outcome]:
    return dict.fromkeys(to_test(), Outcome(True, "as the reference"))


def test_what_passes_its_test_is_ok_and_nothing_else() -> None:
    passed = [*attention_backends(all_pass()), *kernels(all_pass())]
    findings = {(found.group, found.name): found for found in passed}
    works = {name for name, found in findings.items() if found.status == "ok"}
    assert {("attention", "flash"), ("attention", "reference"), ("kernels", "plain")} <= works
    needed = {name for name, found in findings.items() if found.required}
    assert needed == {("attention", "flash"), ("kernels", "plain")}
    assert findings["attention", "cudnn"].status == "missing"


def test_what_is_installed_and_fails_its_test_is_a_problem() -> None:
    failed = dict.fromkeys(to_test(), Outcome(False, "built for another torch"))
    for found in [*attention_backends(failed), *kernels(failed)]:
        if found.status != "missing":
            assert found.status == "problem"
            assert "installed, but cannot run here: built for another torch" in found.value
            assert found.meaning
            assert found.remedy


def test_what_is_not_installed_is_not_tested() -> None:
    names = to_test()
    assert "attention flash" in names
    assert not {"attention xformers", "attention cudnn", "kernels apex", "gpu 0"} & set(names)


@pytest.mark.parametrize(
    ("found", "status"),
    [
        (machine.open_files(1024), "problem"),
        (machine.open_files(4096), "ok"),
        (machine.open_files(resource.RLIM_INFINITY), "ok"),
        (machine.locked_memory(65536, on_gpu=True), "problem"),
        (machine.locked_memory(65536, on_gpu=False), "ok"),
        (machine.locked_memory(resource.RLIM_INFINITY, on_gpu=True), "ok"),
        (machine.shared_memory(64 << 20, on_gpu=True), "problem"),
        (machine.shared_memory(None, on_gpu=True), "problem"),
        (machine.shared_memory(64 << 20, on_gpu=False), "ok"),
        (machine.shared_memory(GIB, on_gpu=True), "ok"),
        (machine.memory(64 * GIB, None), "ok"),
        (machine.memory(64 * GIB, 64 * GIB), "ok"),
        (machine.memory(64 * GIB, 4 * GIB), "note"),
        (machine.processors(8, 8, None), "ok"),
        (machine.processors(2, 8, 2.0), "ok"),
        (machine.processors(8, 8, 2.0), "problem"),
    ],
)
def test_a_limit(found: Finding, status: str) -> None:
    assert found.status == status
    assert (status == "ok") != bool(found.remedy)


@pytest.mark.parametrize(
    ("setting", "status"),
    [("always [madvise] never", "ok"), ("[always] madvise never", "ok"), ("always madvise [never]", "note")],
)
def test_huge_pages(tmp_path, setting: str, status: str) -> None:
    (tmp_path / "enabled").write_text(setting)
    found = machine.huge_pages(tmp_path / "enabled")
    assert found.status == status
    assert f"[{found.value}]" in setting
    assert machine.huge_pages(tmp_path / "nowhere").status == "note"


MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
23 22 0:30 / /home rw shared:2 - nfs4 server:/home rw
24 22 0:31 / /home/a\\040user rw - lustre mds:/fs rw
25 22 0:32 / /tmp rw - tmpfs tmpfs rw
28 22 0:35 / /over rw - nfs server:/x rw
29 28 0:36 / /over rw - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/var/cache", "ext4"),
        ("/home/b", "nfs4"),
        ("/home/a user/cache", "lustre"),
        ("/homework", "ext4"),
        ("/over/cache", "tmpfs"),
    ],
)
def test_the_file_system_of_a_folder(folder: str, kind: str) -> None:
    assert machine.file_system(Path(folder), MOUNTS) == kind


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("ext4", "ok"),
        ("fuse.fuse-overlayfs", "ok"),
        ("nfs4", "problem"),
        ("lustre", "problem"),
        ("fuse.juicefs", "problem"),
    ],
)
def test_the_cache_of_compiled_kernels_is_of_the_node(tmp_path, kind: str, status: str) -> None:
    mounts = f"22 1 8:1 / {tmp_path} rw shared:1 - {kind} device rw"
    found = machine.compile_cache(tmp_path / "to/be/made", mounts)
    assert found.status == status
    assert (status == "problem") == ("TORCHINDUCTOR_CACHE_DIR" in found.remedy)


def test_the_cache_of_compiled_kernels_can_be_written(tmp_path) -> None:
    (tmp_path / "file").touch()
    assert machine.compile_cache(tmp_path / "file/cache", "").status == "problem"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root / "membership"


def test_control_groups_of_version_2_bind_with_those_above(tmp_path) -> None:
    files = {"membership": "0::/job/step", "job/memory.max": "1000", "job/step/memory.max": "max"}
    files |= {"job/cpu.max": "max 100000", "job/step/cpu.max": "150000 100000"}
    membership = write(tmp_path, files)
    assert memory_limit(tmp_path, membership) == 1000
    assert cpu_limit(tmp_path, membership) == 1.5


def test_control_groups_of_version_1(tmp_path) -> None:
    files = {"membership": "4:memory:/job\n1:cpu,cpuacct:/job\n0::/"}
    files |= {"memory/job/memory.limit_in_bytes": "2000", "memory/memory.limit_in_bytes": f"{2**63 - 4096}"}
    files |= {"cpu/job/cpu.cfs_quota_us": "300000", "cpu/job/cpu.cfs_period_us": "100000"}
    files |= {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}
    membership = write(tmp_path, files)
    assert memory_limit(tmp_path, membership) == 2000
    assert cpu_limit(tmp_path, membership) == 3.0


def test_the_largest_number_of_version_1_is_no_limit(tmp_path) -> None:
    files = {"membership": "4:memory:/", "memory/memory.limit_in_bytes": f"{2**63 - 4096}"}
    assert memory_limit(tmp_path, write(tmp_path, files)) is None


def test_without_control_groups_nothing_is_limited(tmp_path) -> None:
    assert memory_limit(tmp_path, tmp_path / "nowhere") is None
    assert cpu_limit(tmp_path, tmp_path / "nowhere") is None


def test_variables_are_known_by_name_or_by_prefix() -> None:
    found = environment({"PATH": "x", "NCCL_DEBUG": "INFO", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"})
    assert [(finding.name, finding.status) for finding in found] == [
        ("NCCL_DEBUG", "note"),
        ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "problem"),
    ]
    assert environment({"CUDA_LAUNCH_BLOCKING": "0"})[0].status == "note"
    assert environment({"PATH": "x"})[0].status == "ok"
    assert "\x1b" not in environment({"NCCL_DEBUG": "\x1b[2J"})[0].value


def test_the_text_says_what_stops_a_run_and_wraps() -> None:
    findings = [
        Finding("a", "one", "ok", "1", remedy="not shown"),
        Finding("a", "two", "problem", "2", "long " * 40, "do this", required=True),
        Finding("b", "three", "missing", "3", required=False),
    ]
    text = as_text(findings)
    assert text.endswith("a training run cannot start: 1 problem")
    assert "-> do this" in text
    assert "not shown" not in text
    assert max(map(len, text.splitlines())) <= 110
    assert text.splitlines()[0] == "a"
    assert "b" in text.splitlines()
    assert as_text(findings[::2]).endswith("a training run can start")
    assert json.loads(as_json_text(findings))["ok"] is False
    assert json.loads(as_json_text(findings[::2]))["ok"] is True


def test_a_cpu_without_bf16_arithmetic_is_a_note_with_a_remedy() -> None:
    assert bf16_on_cpu(True).status == "ok"
    found = bf16_on_cpu(False)
    assert (found.status, found.remedy) == ("note", "set train.precision=fp32 for runs on it")
