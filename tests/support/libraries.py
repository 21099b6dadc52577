"""Everything that ranks import, imported once by the fork server: preloaded by tests/support/world.py."""

import gc

from llama_mcore.observe.log import silence_libraries

silence_libraries(cpu=True)

import deepspeed.module_inject.auto_ep_config  # noqa: E402
import deepspeed.ops  # noqa: E402
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402  by every `deepspeed.initialize`
import megatron.core  # noqa: E402, F401
import pytest  # noqa: E402, F401
import torch.utils.tensorboard  # noqa: E402

import llama_mcore.cli  # noqa: E402
import llama_mcore.launch.preflight  # noqa: E402
import llama_mcore.train.loop  # noqa: E402, F401

deepspeed.ops.__compatible_ops__  # noqa: B018  each engine asks, and the first answer starts a compiler twice
# DeepSpeed collects garbage six times while it starts; half of a short run went into the objects of modules.
gc.collect()
gc.freeze()
