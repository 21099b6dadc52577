"""A run's configuration: every section, and the sizes that several of them decide. Imports no torch."""

from typing import Any, Literal

from pydantic import Field

from llama_mcore.checkpoint.config import CheckpointConfig
from llama_mcore.config.section import Section
from llama_mcore.data.config import DataConfig
from llama_mcore.distributed.config import ParallelConfig, ZeroConfig
from llama_mcore.model.config import ModelConfig
from llama_mcore.observe.config import ObserveConfig
from llama_mcore.train.config import EvalConfig, HealthConfig, OptimConfig, TrainConfig
from llama_mcore.watchdog.config import WatchdogConfig


class RunSection(Section):
    dir: str
    """Folder of the run: metrics, checkpoints, TensorBoard events, the resolved configuration."""
    seed: int = Field(default=1234, ge=0, lt=1 << 32)
    """Seed of the initial weights and of the data order: 32 bits, of which torch on a CPU reads no more."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device that ranks compute on: cuda, a GPU each; cpu; auto, GPUs if there are any."""
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

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches that one rank runs per optimizer step."""
        return self.train.accumulation_steps(self.parallel.dp(world_size))

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch_size * self.model.seq_length

    def changed(self, **sections: dict[str, Any]) -> "RunConfig":
        """A copy with these fields of these sections, which `check_config` has still to check."""
        return self.model_copy(
            update={name: getattr(self, name).model_copy(update=new) for name, new in sections.items()}
        )
