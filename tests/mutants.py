"""Guards of the product taken out, one after another: the tests that are meant for each have to go red.

    python tests/mutants.py                  first these tests with nothing taken out, then every guard
    python tests/mutants.py --only fsync     only guards with this in their name; --list shows the names
    python tests/mutants.py --baseline       only the tests with nothing taken out

Works in copies of the checkout. Exit code 0: the tests are green, and red without each guard. A guard is
found by the name of its function or class, wherever that lies; one whose text has changed is named, and needs
a new edit here.
"""

import argparse
import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue

PACKAGE = "llama_mcore"
LIMIT_S = 600
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "runs", "build", "dist", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info"
)
PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
WITHOUT_XDIST = ["-n", "0"] if find_spec("xdist") else []
GREEN, RED, HANGS = "green", "red", "hangs"


@dataclass(frozen=True)
class Mutant:
    name: str
    """The guard, in plain words."""
    symbol: str
    """`function`, `Class` or `Class.method`; where several have that name, `module:function`."""
    old: str
    """What of it is taken out; it stands there once."""
    new: str
    """What stands there instead."""
    tests: list[str]
    """The arguments of pytest that name the tests meant for it."""


LAYER = "tests/model/test_layer_function.py"
ATTENTION = f"{LAYER}::test_attention_block_by_finite_differences"
MLP = f"{LAYER}::test_mlp_block_by_finite_differences"
COLLECTIVES = "tests/distributed/test_tp_comm.py"
FAULTS = "tests/train/test_faults.py"
ZERO = "tests/train/test_zero.py"
AHEAD = "tests/train/test_rollback.py::test_what_began_in_vain_leaves_no_trace"
BUCKETS = f"{ZERO}::test_a_bucket_is_reduced_beside_the_backward"
POWER_CUT = "tests/checkpoint/test_crash_power.py"
DAMAGE = "tests/checkpoint/test_damage.py"
SUPERVISOR = "tests/watchdog/test_supervisor.py"

MUTANTS = [
    Mutant(
        name="which checkout is measured first changes",
        symbol="beside",
        old="[:: -1 if number % 2 == 0 else 1]",
        new="",
        tests=["tests/benchmark/test_step.py::test_another_checkout_is_measured_by_turns"],
    ),
    Mutant(
        name="a step has the tokens of all its micro-batches",
        symbol="benchmark.step:summarize",
        old="tokens * request.accumulation / median",
        new="tokens / median",
        tests=["tests/benchmark/test_step.py::test_a_step_of_several_micro_batches_has_as_many_tokens"],
    ),
    Mutant(
        name="Liger's kernels stay with their contender",
        symbol="LigerContender.close",
        old="vars(modeling_llama).update(self._names)",
        new="pass",
        tests=["tests/benchmark/test_contenders.py::test_liger_replaces_names_only_while_it_is_there"],
    ),
    Mutant(
        name="the contenders' gradients are of the mean loss",
        symbol="PlainContender.backward",
        old=" / len(self.batches)",
        new="",
        tests=["tests/benchmark/test_contenders.py::test_gradients_add_up_over_micro_batches"],
    ),
    Mutant(
        name="backward keeps the layer input",
        symbol="AttentionBlockFunction.forward",
        old="save_for_backward(x, qkv, out,",
        new="save_for_backward(torch.zeros_like(x), qkv, out,",
        tests=[ATTENTION],
    ),
    Mutant(
        name="backward keeps qkv",
        symbol="AttentionBlockFunction.forward",
        old="save_for_backward(x, qkv, out,",
        new="save_for_backward(x, torch.zeros_like(qkv), out,",
        tests=[ATTENTION],
    ),
    Mutant(
        name="backward keeps the attention output",
        symbol="AttentionBlockFunction.forward",
        old="save_for_backward(x, qkv, out,",
        new="save_for_backward(x, qkv, torch.zeros_like(out),",
        tests=[ATTENTION],
    ),
    Mutant(
        name="backward keeps the log-sum-exp",
        symbol="AttentionBlockFunction.forward",
        old="out, log_sum_exp, norm_weight,",
        new="out, torch.zeros_like(log_sum_exp), norm_weight,",
        tests=[ATTENTION],
    ),
    Mutant(
        name="backward keeps the residual after attention",
        symbol="MlpBlockFunction.forward",
        old="save_for_backward(x, gate_up,",
        new="save_for_backward(torch.zeros_like(x), gate_up,",
        tests=[MLP],
    ),
    Mutant(
        name="backward keeps the fc1 output",
        symbol="MlpBlockFunction.forward",
        old="save_for_backward(x, gate_up,",
        new="save_for_backward(x, torch.zeros_like(gate_up),",
        tests=[MLP],
    ),
    Mutant(
        name="all-gather of sequence parallelism",
        symbol="TensorParallel.start_gather",
        old="Pending(whole, dist.all_gather_into_tensor(whole, x.contiguous(), self.group, async_op=True))",
        new="Pending(x.repeat(self.size, 1, 1))",
        tests=[COLLECTIVES],
    ),
    Mutant(
        name="reduce-scatter of sequence parallelism",
        symbol="TensorParallel.start_reduce",
        old="Pending(part, dist.reduce_scatter_tensor(part, x, group=self.group, async_op=True))",
        new="Pending(x.chunk(self.size)[self.rank])",
        tests=[COLLECTIVES],
    ),
    Mutant(
        name="norm weight gradient is summed over sequence parts",
        symbol="TensorParallel.start_replicated_sum",
        old="Pending(gradient, dist.all_reduce(gradient, group=self.group, async_op=True))",
        new="Pending(gradient)",
        tests=[COLLECTIVES],
    ),
    Mutant(
        name="gradients of QK-norm are summed over heads",
        symbol="AttentionBlockFunction.backward",
        old="always=True",
        new="always=False",
        tests=["tests/train/test_layouts.py::test_layouts_with_qk_norm_equal_one_process"],
    ),
    Mutant(
        name="loss is summed over vocabulary parts",
        symbol="_over_ranks",
        old="target_logits.sum(0)",
        new="target_logits[tp.rank]",
        tests=["tests/model/test_fused_loss.py::test_tensor_parallel"],
    ),
    Mutant(
        name="softmax is over all vocabulary parts",
        symbol="by_softmax",
        old="if tp.size > 1:",
        new="if False:",
        tests=["tests/model/test_fused_loss.py::test_tensor_parallel"],
    ),
    Mutant(
        name="what a mask leaves out has no gradient",
        symbol="by_softmax",
        old="probabilities.mul_(mask[:, None])",
        new="pass",
        tests=["tests/model/test_fused_loss.py::test_one_process"],
    ),
    Mutant(
        name="a weight with a sum of gradients gets that of the loss there",
        symbol="_LinearCrossEntropy.backward",
        old="add_to_main_grad(weight, grad_weight, factor)",
        new="grad_weight.mul_(factor).to(weight.dtype)",
        tests=["tests/model/test_fused_loss.py::test_a_weight_that_has_a_sum_gets_its_gradient_there"],
    ),
    Mutant(
        name="the gradient past a norm is added to its own",
        symbol="rmsnorm_backward",
        old="grad_x += residual_grad",
        new="pass",
        tests=[ATTENTION, MLP],
    ),
    Mutant(
        name="one rank's GEMM adds the residual",
        symbol="linear_added",
        old="torch.addmm(residual.flatten(0, 1), x.flatten(0, 1), weight.t())",
        new="torch.mm(x.flatten(0, 1), weight.t())",
        tests=[ATTENTION, MLP],
    ),
    Mutant(
        name="values reach attention without a copy",
        symbol="rotated_qkv",
        old="rope(k, cos, sin), v",
        new="rope(k, cos, sin), v.contiguous()",
        tests=["tests/model/test_qkv.py"],
    ),
    Mutant(
        name="keys of grouped queries are repeated where cuDNN would be wrong",
        symbol="_goes_wrong",
        old="groups < 8",
        new="False",
        tests=["tests/model/test_attention_choice.py"],
    ),
    Mutant(
        name="gradient norm is summed over tensor-parallel ranks",
        symbol="_unsharded_grad_norm",
        old="dist.all_reduce(squares, group=groups.tp_group)",
        new="pass",
        tests=[f"{FAULTS}::test_an_infinity_in_one_gradient_changes_no_weight"],
    ),
    Mutant(
        name="where one rank fails all end, for the same reason",
        symbol="run_on_all_ranks",
        old="if any_rank(groups, failure is not None):",
        new="if failure is not None:\n        raise failure\n    if False:",
        tests=["tests/train/test_refusals.py::test_bad_input_is_one_message"],
    ),
    Mutant(
        name="the update after a save waits for the copy of the state",
        symbol="Step.finish",
        old="before_update()",
        new="pass",
        tests=["tests/train/test_step.py", "tests/checkpoint/test_saver.py"],
    ),
    Mutant(
        name="a run lets its updates wait for the copy",
        symbol="Trainer._train",
        old=", self.saver.before_update)",
        new=")",
        tests=["tests/checkpoint/test_saver.py"],
    ),
    Mutant(
        name="the next step begins before the result of this one is read",
        symbol="Trainer._train",
        old="self._may_pause_after(step)",
        new="True",
        tests=[AHEAD],
    ),
    Mutant(
        name="a rollback discards the step that has begun",
        symbol="Trainer.step",
        old="self._discard_ahead()",
        new="pass",
        tests=[AHEAD],
    ),
    Mutant(
        name="a step that is discarded leaves no weights gathered",
        symbol="Step.discard",
        old="self._engine.empty_partition_cache()",
        new="pass",
        tests=["tests/train/test_step.py::test_a_step_that_is_discarded_leaves_no_weight_gathered"],
    ),
    Mutant(
        name="where one rank cannot read the next step, all know before its backward",
        symbol="Trainer.step",
        old=" or told.unread",
        new="",
        tests=["tests/train/test_ahead.py"],
    ),
    Mutant(
        name="where a report cannot be written, all know at the end of the next step",
        symbol="Trainer._train",
        old="result.notices.unwritten",
        new="False",
        tests=["tests/train/test_ahead.py"],
    ),
    Mutant(
        name="garbage is collected at fixed steps alone",
        symbol="Trainer.run",
        old="with _collected_by_hand():",
        new="if True:",
        tests=["tests/train/test_trainer.py"],
    ),
    Mutant(
        name="a run that ends leaves what is copied when that is done",
        symbol="Saver.close",
        old="self.before_update()",
        new="pass",
        tests=["tests/checkpoint/test_saver.py"],
    ),
    Mutant(
        name="a copy that failed is not waited for",
        symbol="Saver._write",
        old="copying.copied.set()",
        new="pass",
        tests=["tests/checkpoint/test_saver.py"],
    ),
    Mutant(
        name="training waits while a ring is written",
        symbol="Saver.begin",
        old="self._host_copy.is_ring",
        new="False",
        tests=["tests/checkpoint/test_saver.py"],
    ),
    Mutant(
        name="a slot of a ring is used again when it is hashed",
        symbol="write_file",
        old="held is not None and len(hashing) > held",
        new="False",
        tests=["tests/checkpoint/test_snapshot.py"],
    ),
    Mutant(
        name="fsync of a file of a checkpoint",
        symbol="write_file",
        old="os.fsync(file.fileno())",
        new="pass",
        tests=[f"{POWER_CUT}::test_a_power_cut_loses_nothing"],
    ),
    Mutant(
        name="fsync of the names in a folder",
        symbol="sync_folder",
        old="os.fsync(descriptor)",
        new="pass",
        tests=[f"{POWER_CUT}::test_a_power_cut_loses_nothing"],
    ),
    Mutant(
        name="small files take their name by a rename",
        symbol="replace_hint",
        old='path.with_name(f".{path.name}.tmp")',
        new="path",
        tests=["tests/checkpoint/test_run_dir.py"],
    ),
    Mutant(
        name="retention: checkpoints of later steps do not count",
        symbol="saver:_tidy",
        old="path.stem < final.stem and",
        new="path != final and",
        tests=["tests/checkpoint/test_crash.py"],
    ),
    Mutant(
        name="retention: checkpoints of other runs stay",
        symbol="saver:_tidy",
        old="if run_id_of(path) == run_id]",
        new="]",
        tests=["tests/checkpoint/test_crash.py"],
    ),
    Mutant(
        name="a checkpoint of another run is not gone on from",
        symbol="held_in",
        old="manifest.run_id != lineage.run_id",
        new="False",
        tests=["tests/checkpoint/test_start.py"],
    ),
    Mutant(
        name="a run begins again with the weights that it began with",
        symbol="checkpoint.start:_unchanged",
        old="origin_of(folder).manifest_sha256 == origin.manifest_sha256",
        new="True",
        tests=["tests/checkpoint/test_start.py"],
    ),
    Mutant(
        name="fencing: a holder thought dead may not publish",
        symbol="Lease.check",
        old=" or any(self.path.with_name(name).exists() for name in names)",
        new="",
        tests=["tests/checkpoint/test_run_lock.py::test_a_holder_that_lost_its_lease_may_not_publish"],
    ),
    Mutant(
        name="SHA-256 of the files of a checkpoint",
        symbol="damaged_files",
        old="if found != file.sha256:",
        new="if False:",
        tests=[f"{DAMAGE}::test_a_flipped_bit_in_any_byte_of_a_rank_file_is_found"],
    ),
    Mutant(
        name="SHA-256 of the manifest of a checkpoint",
        symbol="checkpoint.manifest:read_manifest",
        old="content.pop(_CHECKSUM, None) != _checksum(content)",
        new="content.pop(_CHECKSUM, None) is None",
        tests=[f"{DAMAGE}::test_a_flipped_bit_in_any_byte_of_the_manifest_is_found_or_means_nothing"],
    ),
    Mutant(
        name="outputs take their name by a rename",
        symbol="published",
        old="temporary = temporary_name(path)",
        new="temporary = path",
        tests=["tests/test_files.py"],
    ),
    Mutant(
        name="fsync of an output before its rename",
        symbol="replace_durably",
        old="os.fsync(stream.fileno())",
        new="pass",
        tests=["tests/launch/test_slurm.py::test_a_script_is_written_whole_or_not_at_all"],
    ),
    Mutant(
        name="checksums of the tokens of a dataset",
        symbol="_damage",
        old="if manifest and zlib.crc32(block.data) != manifest.block_checksums[number]:",
        new="if False:",
        tests=["tests/data/test_verify.py::test_every_flipped_bit_of_the_tokens_is_found"],
    ),
    Mutant(
        name="a run reads no more than planned",
        symbol="check_caps",
        old="if not over:",
        new="if True:",
        tests=["tests/data/test_data_plan.py::test_epochs_give_shares_and_caps"],
    ),
    Mutant(
        name="a mixture is within one sample of its shares",
        symbol="_allowed",
        old="return index * total // share",
        new="return 0",
        tests=["tests/data/test_mixture.py::test_shares_that_are_hard_on_simpler_rules"],
    ),
    Mutant(
        name="an epoch reads every window once",
        symbol="windows_at",
        old="outside = np.flatnonzero(windows >= num_windows)",
        new="windows %= np.uint64(num_windows); outside = windows[:0]",
        tests=["tests/data/test_sample_order.py::test_every_window_once_an_epoch"],
    ),
    Mutant(
        name="the audit counts how often a window was read",
        symbol="check_uses",
        old="if use.most > use.allowed:",
        new="if False:",
        tests=["tests/data/test_audit.py::test_an_order_that_repeats_windows_is_found"],
    ),
    Mutant(
        name="a rank without a sign of life has stalled",
        symbol="HeartbeatRecord.is_overdue",
        old="return now - max(self.at, awake_since) > self.allowed_s",
        new="return False",
        tests=["tests/watchdog/test_heartbeat.py::test_a_beat_is_overdue_after_what_is_allowed"],
    ),
    Mutant(
        name="a rank that was killed is no success",
        symbol="Supervisor._exit_code",
        old="return 128 - code",
        new="return 0",
        tests=[f"{SUPERVISOR}::test_a_signal_that_nobody_asked_for_is_named"],
    ),
    Mutant(
        name="a process that trains dies with its supervisor",
        symbol="die_with_parent",
        old="_PR_SET_PDEATHSIG, signal.SIGKILL",
        new="_PR_SET_PDEATHSIG, 0",
        tests=[f"{SUPERVISOR}::test_the_process_dies_with_its_supervisor"],
    ),
    Mutant(
        name="a run that is asked to stop saves",
        symbol="Trainer.run",
        old="if stopping or due:",
        new="if due:",
        tests=["tests/train/test_elastic.py"],
    ),
    Mutant(
        name="tensor parallelism divides what it splits",
        symbol="_check_splits",
        old="if value % parallel.tp",
        new="if value < parallel.tp",
        tests=["tests/config/test_config.py::test_what_tensor_parallelism_splits_must_divide"],
    ),
    Mutant(
        name="unknown keys are refused",
        symbol="Section",
        old='extra="forbid"',
        new='extra="ignore"',
        tests=["tests/config/test_config.py::test_an_unknown_key_is_refused_with_the_nearest_name"],
    ),
    Mutant(
        name="no run begins in a folder that is not its own",
        symbol="_plan_in",
        old="raise would_start_from_scratch(run_dir)",
        new="pass",
        tests=["tests/train/test_resume.py"],
    ),
    Mutant(
        name="no run resumes with other data or another seed",
        symbol="continued",
        old="if not accept_change:",
        new="if False:",
        tests=["tests/data/test_data_plan.py::test_resuming_with_other_data_is_refused"],
    ),
    Mutant(
        name="a loss that is not finite changes no weight",
        symbol="_nan_gradient_if_loss_not_finite",
        old="return loss * ",
        new="return loss if loss is not None else ",
        tests=[f"{FAULTS}::test_a_nan_in_one_ranks_loss_changes_no_weight"],
    ),
    Mutant(
        name="the first gradient of a step overwrites the last step's sum",
        symbol="weight_grad:_add",
        old='0 if getattr(weight, "overwrite_main_grad", False) else 1',
        new="1",
        tests=[f"{ZERO}::test_each_step_is_that_of_plain_torch"],
    ),
    Mutant(
        name="later gradients are added to the sum",
        symbol="weight_grad:_add",
        old="    weight.overwrite_main_grad = False",
        new="    pass",
        tests=[f"{ZERO}::test_each_step_is_that_of_plain_torch"],
    ),
    Mutant(
        name="a weight without a gradient in a step counts as zero",
        symbol="Stage1.reduce_gradients",
        old="if weight.overwrite_main_grad:",
        new="if False:",
        tests=[f"{ZERO}::test_each_step_is_that_of_plain_torch"],
    ),
    Mutant(
        name="gradients are the mean over data-parallel ranks",
        symbol="Stage1.reduce_gradients",
        old="torch.div(received, size, out=part)",
        new="part.copy_(received)",
        tests=[f"{ZERO}::test_each_step_is_that_of_plain_torch_on_two_ranks"],
    ),
    Mutant(
        name="a full bucket is reduced before the next gradient",
        symbol="Stage2.place",
        old="self._reduce_bucket()",
        new="pass",
        tests=[f"{ZERO}::test_each_step_is_that_of_plain_torch_on_two_ranks"],
    ),
    Mutant(
        name="each gradient has a place of its own in the bucket",
        symbol="Stage2.filled",
        old="self._used += weight.numel()",
        new="pass",
        tests=[f"{ZERO}::test_each_step_is_that_of_plain_torch"],
    ),
    Mutant(
        name="what is left in the bucket is reduced when a backward has ended",
        symbol="Stage2.independent_gradient_partition_epilogue",
        old="        self._reduce_bucket()",
        new="        pass",
        tests=[f"{ZERO}::test_each_step_is_that_of_plain_torch"],
    ),
    Mutant(
        name="a bucket is filled again once it is reduced",
        symbol="Stage2._reduce_bucket",
        old="device.current_stream().wait_event(before)",
        new="pass",
        tests=[BUCKETS],
    ),
    Mutant(
        name="a bucket is reduced once its gradients are made",
        symbol="Stage2._reduce_bucket",
        old="self.reduction_stream.wait_stream(device.current_stream())",
        new="pass",
        tests=[BUCKETS],
    ),
    Mutant(
        name="the update waits for the last reduction",
        symbol="Stage2.independent_gradient_partition_epilogue",
        old="get_accelerator().current_stream().wait_stream(self.reduction_stream)",
        new="pass",
        tests=[BUCKETS],
    ),
    Mutant(
        name="both gradients of a tied embedding count at stage 2",
        symbol="Stage2.__init__",
        old="if self.param_names[weight] != EMBEDDING:",
        new="if True:",
        tests=[f"{ZERO}::test_each_step_is_that_of_plain_torch"],
    ),
    Mutant(
        name="replicated parameters count once in the norm",
        symbol="OnePassStep._global_norm",
        old="squares if counts else squares * 0",
        new="squares",
        tests=["tests/train/test_layouts.py"],
    ),
    Mutant(
        name="parameters count on every rank that has a part of them",
        symbol="OnePassStep._global_norm",
        old="is_split = all(weight.tensor_model_parallel for weight in group)",
        new="is_split = False",
        tests=["tests/train/test_layouts.py"],
    ),
    Mutant(
        name="the norm is that of all ranks",
        symbol="OnePassStep._global_norm",
        old="dist.all_reduce(total)",
        new="pass",
        tests=[f"{ZERO}::test_each_step_is_that_of_plain_torch_on_two_ranks"],
    ),
    Mutant(
        name="the gradient is clipped",
        symbol="OnePassStep._update",
        old="limit = self.clip_grad or torch.inf",
        new="limit = torch.inf",
        tests=[f"{ZERO}::test_each_step_is_that_of_plain_torch"],
    ),
    Mutant(
        name="a gradient that is not finite changes nothing",
        symbol="OnePassStep._update",
        old="(~norm.isfinite()).float()",
        new="torch.zeros_like(norm).float()",
        tests=[f"{ZERO}::test_each_step_is_that_of_plain_torch"],
    ),
    Mutant(
        name="torch's kernel leaves out a step that is not finite",
        symbol="_fused",
        old="found_inf=skip",
        new="found_inf=None",
        tests=["tests/train/test_adamw.py"],
    ),
    Mutant(
        name="torch's kernel clips",
        symbol="_fused",
        old="grad_scale=clip.reciprocal()",
        new="grad_scale=None",
        tests=["tests/train/test_adamw.py"],
    ),
    Mutant(
        name="the compiled update leaves out a step that is not finite",
        symbol="one_pass",
        old="keep = skip > 0",
        new="keep = skip > 1",
        tests=["tests/train/test_adamw.py"],
    ),
    Mutant(
        name="a step left out is not counted",
        symbol="update",
        old='state["step"] += 1 - skip',
        new='state["step"] += 1',
        tests=["tests/train/test_adamw.py"],
    ),
    Mutant(
        name="the learning rate is no constant of what is compiled",
        symbol="_factors",
        old='torch.full((), group["lr"], dtype=torch.float64, device=step.device)',
        new='group["lr"]',
        tests=["tests/train/test_adamw.py"],
    ),
    Mutant(
        name="a state with a NaN is not saved",
        symbol="not_finite",
        old="strict=True) if not is_finite",
        new="strict=True) if False",
        tests=[f"{FAULTS}::test_a_state_with_a_nan_is_not_saved"],
    ),
    Mutant(
        name="rollbacks have a limit",
        symbol="judge",
        old="if len(recent) >= config.max_rollbacks:",
        new="if False:",
        tests=["tests/train/test_health.py::test_never_more_rollbacks_than_the_limit"],
    ),
    Mutant(
        name="copies of a weight are compared",
        symbol="check_replicas",
        old="differs |= (extremes[0] != ~extremes[1]).any()",
        new="pass",
        tests=["tests/distributed/test_replicas.py"],
    ),
    Mutant(
        name="a run without progress is not started again",
        symbol="check_progress",
        old="if len(fruitless) < MAX_FRUITLESS:",
        new="if True:",
        tests=["tests/observe/goodput/test_no_progress.py"],
    ),
    Mutant(
        name="a profile overwrites none",
        symbol="Profiler._write",
        old='if not any(folder.glob(f"{file}.*"))',
        new="if True",
        tests=["tests/observe/test_profile.py::test_a_step_that_is_trained_again_goes_to_another_folder"],
    ),
    Mutant(
        name="a profile that cannot be written stops no rank",
        symbol="Profiler._write",
        old="except (OSError, OutputError) as error:",
        new="except ZeroDivisionError as error:",
        tests=[
            "tests/observe/test_profile.py::test_training_goes_on_without_a_profile_that_cannot_be_written"
        ],
    ),
    Mutant(
        name="a pickle runs no code",
        symbol="sandbox:_content",
        old="weights_only=True",
        new="weights_only=False",
        tests=["tests/convert/test_torch_pickle.py::test_no_code_is_run"],
    ),
]


@dataclass(frozen=True)
class Place:
    path: Path
    """Relative to the checkout."""
    first: int
    end: int
    """Its lines, counted from 0."""


@dataclass(frozen=True)
class Job:
    name: str
    tests: list[str]
    edited: dict[Path, str] = field(default_factory=dict)
    """Files of the checkout that have another text."""


@dataclass(frozen=True)
class Outcome:
    verdict: str
    seconds: float
    output: str

    def __str__(self) -> str:
        """Time, verdict and the first test that failed."""
        failed = re.search(r"^(FAILED|ERROR) (\S+)", self.output, re.MULTILINE)
        return f"{self.seconds:4.0f} s  {self.verdict}" + (f" by {failed[2]}" if failed else "")


def places_of_symbols(root: Path) -> dict[str, list[Place]]:
    """Places of the package's definitions, by qualified name."""
    found = defaultdict(list)
    for path in sorted((root / PACKAGE).rglob("*.py")):
        for name, node in definitions(ast.parse(path.read_text())):
            found[name].append(Place(path.relative_to(root), node.lineno - 1, node.end_lineno or node.lineno))
    return found


def definitions(tree: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, ast.stmt]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield prefix + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from definitions(node, f"{prefix}{node.name}.")


def without(mutant: Mutant, root: Path, places: dict[str, list[Place]]) -> dict[Path, str]:
    """The file that has the guard, with its text without it. Raises ValueError where it is not found."""
    module, _, name = mutant.symbol.rpartition(":")
    found = [
        place
        for place in places.get(name, [])
        if not module or f"/{place.path.with_suffix('')}".endswith("/" + module.replace(".", "/"))
    ]
    if len(found) != 1:
        where = ", ".join(str(place.path) for place in found) or "no file"
        raise ValueError(f"{mutant.name}: {mutant.symbol} must be in one file and is in {where}")
    (place,) = found
    lines = (root / place.path).read_text().split("\n")
    text = "\n".join(lines[place.first : place.end])
    if (count := text.count(mutant.old)) != 1:
        raise ValueError(
            f"{mutant.name}: {mutant.symbol} must hold {mutant.old!r} once and does {count} times"
        )
    mutated = text.replace(mutant.old, mutant.new)
    whole = "\n".join([*lines[: place.first], mutated, *lines[place.end :]])
    try:
        compile(whole, place.path, "exec")
    except SyntaxError as error:
        raise ValueError(f"{mutant.name}: {mutant.new!r} is no Python there ({error})") from None
    return {place.path: whole}


class Copies:
    """Copies of a checkout, in which jobs run side by side."""

    def __init__(self, root: Path, folder: Path, count: int) -> None:
        self._count = count
        self._running: set[subprocess.Popen[bytes]] = set()
        self._free: SimpleQueue[Path] = SimpleQueue()
        for number in range(count):
            self._free.put(shutil.copytree(root, folder / str(number), symlinks=True, ignore=LEFT_OUT))

    def run(self, jobs: Sequence[Job], wanted: Sequence[str]) -> list[Outcome]:
        """Outcome of each job. Prints a line as one ends, and its output if the verdict is not wanted."""
        began = time.monotonic()
        with ThreadPoolExecutor(self._count) as pool:
            futures = {pool.submit(self._run, job): job for job in jobs}
            try:
                for done, future in enumerate(as_completed(futures), 1):
                    passed, outcome = time.monotonic() - began, future.result()
                    left = passed / done * (len(jobs) - done)
                    progress = f"{done:2} of {len(jobs)}, {passed / 60:4.1f} min, {left / 60:4.1f} to go"
                    print(f"[{progress}]  {futures[future].name}: {outcome}", flush=True)
                    if outcome.verdict not in wanted:
                        print(f"{outcome.output[-4000:]}\n", flush=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in set(self._running):
                    end(process)
                raise
        return [future.result() for future in futures]

    def _run(self, job: Job) -> Outcome:
        copy = self._free.get()
        before = {path: (copy / path).read_text() for path in job.edited}
        try:
            write_files(copy, job.edited)
            return self._test(copy, job.tests)
        finally:
            write_files(copy, before)
            self._free.put(copy)

    def _test(self, copy: Path, tests: Sequence[str]) -> Outcome:
        """Run these tests and end whatever they leave running."""
        command = [*PYTEST, *WITHOUT_XDIST, *tests]
        output, began = copy.with_suffix(".txt"), time.monotonic()
        with output.open("wb") as file:
            environment = os.environ | {"PYTHONPATH": str(copy)}
            process = subprocess.Popen(
                command, cwd=copy, env=environment, stdout=file, stderr=file, start_new_session=True
            )
            self._running.add(process)
            try:
                code = process.wait(LIMIT_S)
                verdict = {0: GREEN, 1: RED}.get(code, f"broken: exit code {code}")
            except subprocess.TimeoutExpired:
                verdict = HANGS
            finally:
                end(process)
                self._running.remove(process)
        return Outcome(verdict, time.monotonic() - began, output.read_text(errors="replace"))


def write_files(folder: Path, texts: Mapping[Path, str]) -> None:
    for path, text in texts.items():
        (folder / path).write_text(text)


def end(process: subprocess.Popen[bytes]) -> None:
    """And what it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def whole_product(mutants: Sequence[Mutant]) -> list[Job]:
    """All tests of the mutants, each once and with nothing taken out: a job for each file."""
    by_file: dict[str, list[str]] = defaultdict(list)
    for test in dict.fromkeys(test for mutant in mutants for test in mutant.tests):
        by_file[test.partition("::")[0]].append(test)
    return [Job(file, [file] if file in tests else tests) for file, tests in by_file.items()]


def table(mutants: Sequence[Mutant], outcomes: Sequence[Outcome]) -> str:
    rows = ["| guard | symbol | tests | verdict | seconds |", "|---|---|---|---|---|"]
    for mutant, outcome in zip(mutants, outcomes, strict=True):
        tests = ", ".join(mutant.tests)
        verdict = "SURVIVED" if outcome.verdict == GREEN else outcome.verdict
        rows.append(f"| {mutant.name} | `{mutant.symbol}` | {tests} | {verdict} | {outcome.seconds:.0f} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", metavar="NAME", help="guards with this in their name")
    parser.add_argument("--list", action="store_true", help="say which guards there are, and no more")
    parser.add_argument("--baseline", action="store_true", help="take nothing out, and no more")
    parser.add_argument("--jobs", type=int, default=2, help="how many tests run side by side (2)")
    parser.add_argument(
        "--root", type=Path, default=Path(__file__).parents[1], help="the checkout (this one)"
    )
    asked = parser.parse_args()
    root, mutants = asked.root.resolve(), [mutant for mutant in MUTANTS if asked.only in mutant.name]
    if asked.list:
        print("\n".join(f"{mutant.name}: {mutant.symbol}" for mutant in mutants))
        return 0
    places, jobs, wrong = places_of_symbols(root), [], []
    for mutant in mutants:
        try:
            jobs.append(Job(mutant.name, mutant.tests, without(mutant, root, places)))
        except ValueError as error:
            wrong.append(str(error))
    if wrong or not mutants:
        print("\n".join(wrong or [f"no guard has {asked.only!r} in its name"]), file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as folder:
        copies = Copies(root, Path(folder), asked.jobs)
        if asked.baseline or not asked.only:
            print(f"{root} with nothing taken out", flush=True)
            outcomes = copies.run(whole_product(mutants), [GREEN])
            if asked.baseline or any(outcome.verdict != GREEN for outcome in outcomes):
                return int(any(outcome.verdict != GREEN for outcome in outcomes))
        print(f"{root} without one guard after another", flush=True)
        outcomes = copies.run(jobs, [RED, HANGS])
    red = sum(outcome.verdict in (RED, HANGS) for outcome in outcomes)
    print(f"\n{table(mutants, outcomes)}\n\n{red} of {len(mutants)} red")
    return int(red < len(mutants))


if __name__ == "__main__":
    sys.exit(main())
