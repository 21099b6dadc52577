"""The train command, in which one rank's loss is NaN in one step: worker of test_disturbed.py.

python tests/train/nan_at.py STEP --config NAME ...
"""

import os
import sys
from typing import Any

from llama_mcore.observe.phases import Phase, Phases

enter = Phases.enter
RANK = "1"


def spoil(step: int) -> None:
    from llama_mcore.train import step as step_module

    mean_loss, now = step_module.mean_loss, [0]

    def entered(phases: Phases, phase: Phase, number: int) -> None:
        now[0] = number if phase is Phase.TRAIN else 0
        enter(phases, phase, number)

    def spoilt(*arguments: Any) -> Any:
        here = now[0] == step and os.environ["RANK"] == RANK
        return mean_loss(*arguments) * (float("nan") if here else 1)

    Phases.enter = entered  # type: ignore[method-assign]
    step_module.mean_loss = spoilt


if __name__ == "__main__":
    from llama_mcore import cli

    spoil(int(sys.argv.pop(1)))
    cli.main("train")
