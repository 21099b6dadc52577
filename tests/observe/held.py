"""The lease of a run, without its folder."""

from dataclasses import dataclass


@dataclass
class Held:
    number: int = 1
    is_lost: bool = False

    def check(self) -> None:
        if self.is_lost:
            raise OSError(0, "the run was taken over by another job")
