"""Everything that ranks import, imported once by the fork server: preloaded by tests/support/world.py."""

from llama_mcore.observe.log import silence_libraries

silence_libraries(cpu=True)

import deepspeed  # noqa: E402, F401
import megatron.core  # noqa: E402, F401
import pytest  # noqa: E402, F401
import torch.utils.tensorboard  # noqa: E402, F401

import llama_mcore.cli  # noqa: E402
import llama_mcore.launch.preflight  # noqa: E402
import llama_mcore.train.loop  # noqa: E402, F401
