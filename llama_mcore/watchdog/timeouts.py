"""How many seconds may pass until a rank's next sign of life."""

from collections import deque
from statistics import median

from llama_mcore.observe.phases import Phase
from llama_mcore.watchdog.config import WatchdogConfig

FIRST_STEPS = 3
"""Steps after a start that say nothing of those to come: kernels are compiled."""
WINDOW = 50
"""Steps that the median is over."""


class Timeouts:
    """Knows how long the steps of this attempt took."""

    def __init__(self, config: WatchdogConfig, save_timeout_s: float) -> None:
        """`save_timeout_s`: after which a save fails by itself."""
        self._config = config
        self._limits = {
            Phase.START: config.start_s,
            Phase.SETUP: config.setup_s,
            Phase.EVALUATE: config.evaluate_s,
            Phase.SAVE: save_timeout_s + config.save_s,
            Phase.END: config.end_s,
        }
        self._steps: deque[float] = deque(maxlen=WINDOW)
        self._step_began: float | None = None

    def enter(self, phase: Phase, now: float) -> float:
        """Seconds from one sign of life to the next in `phase`, which begins `now` (seconds, monotonic)."""
        if self._step_began is not None:
            self._steps.append(now - self._step_began)
        self._step_began = now if phase is Phase.TRAIN else None
        return self._step_s() if phase is Phase.TRAIN else self._limits[phase]

    def _step_s(self) -> float:
        if len(self._steps) < FIRST_STEPS:
            return max(self._config.first_step_s, self._config.min_step_s)
        return max(self._config.min_step_s, self._config.step_factor * median(self._steps))
