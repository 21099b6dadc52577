"""Timeouts of the watchdog. Imports no torch."""

from pydantic import Field

from llama_mcore.config.section import Section

# Collectives wait longer than the longest of these, and take no more than thirty years.
LONGEST_S = 1e9


class WatchdogConfig(Section):
    """A rank without a heartbeat for so long ends the run with exit code 75: see docs/operations.md."""

    enabled: bool = True
    """End a run whose heartbeat is overdue."""
    step_factor: float = Field(default=10.0, ge=2, le=LONGEST_S)
    """A step may take this many times the median of the steps before it,"""
    min_step_s: float = Field(default=180.0, gt=0, le=LONGEST_S)
    """and at least this many seconds."""
    first_step_s: float = Field(default=1800.0, gt=0, le=LONGEST_S)
    """Seconds for each of the first three steps after a start, which compile kernels and open connections."""
    start_s: float = Field(default=1200.0, gt=0, le=LONGEST_S)
    """Seconds for imports and until all ranks have joined."""
    setup_s: float = Field(default=1800.0, gt=0, le=LONGEST_S)
    """Seconds for each of: opening the data, building model and engine, loading the next part of a
    checkpoint, waiting for ranks that have more of it to load."""
    save_s: float = Field(default=300.0, gt=0, le=LONGEST_S)
    """Seconds that training may wait for a save beyond `checkpoint.timeout_s`, which fails the save; in a
    rollback as `setup_s`."""
    evaluate_s: float = Field(default=600.0, gt=0, le=LONGEST_S)
    """Seconds for reading the validation batches of a source, and for each of them."""
    end_s: float = Field(default=300.0, gt=0, le=LONGEST_S)
    """Seconds from the last save to the end of the process."""

    @property
    def longest_s(self) -> float:
        """The longest of these; steps whose median is above a tenth of it may take longer."""
        return max(
            *(self.min_step_s, self.first_step_s, self.start_s, self.setup_s),
            *(self.save_s, self.evaluate_s, self.end_s),
        )
