"""What the statistics of a corpus are asked for: options, and their ranges."""

from dataclasses import dataclass
from enum import StrEnum

from ..errors import UserError
from .moments import LiveRule
from .settings import DEFAULT_MEMORY

LEAST_MEMORY = 64 * 1024**2
"""Less than this many bytes would not hold the products' own working space."""


class BadStatisticsOptions(UserError):
    """An option of the statistics is out of its range."""


class Between(StrEnum):
    """Which pairs of different sites products are kept of."""

    NONE = "none"
    ADJACENT = "adjacent"
    """A site and each site that it reads from."""
    ALL = "all"


@dataclass(frozen=True, kw_only=True)
class StatisticsOptions:
    """What is measured, and how. All but `commit_seconds`, `memory` and `seed` are part of the run's key.

    The seed is only noted: the pass has no randomness. Another `memory` changes when products are folded, hence their last bits.

    length: tokens per block of a corpus. batch_size: sequences (or pairs) per forward pass.
    skip_positions: first positions left out; None is 1 for corpora, 0 for tasks.
    n_contexts, before, after: strongest contexts per node, and the tokens kept around each.
    second_moments: products of the live features (`LiveRule`: frequency ≥ min_frequency over the first live_rows tokens, max_live at most).
    between: pairs of different sites whose products are kept too. memory: bytes for all products and what waits for them; more is on disk.
    by_position: means per position too. commit_seconds: a killed run loses about this much work.
    """

    length: int = 128
    batch_size: int = 8
    skip_positions: int | None = None
    n_contexts: int = 10
    before: int = 16
    after: int = 8
    second_moments: bool = True
    live_rows: int = LiveRule.rows
    min_frequency: float = LiveRule.min_frequency
    max_live: int = LiveRule.max_live
    between: Between = Between.NONE
    memory: int = DEFAULT_MEMORY
    by_position: bool = False
    seed: int = 0
    commit_seconds: float = 30.0

    def __post_init__(self) -> None:
        least = {
            "length": 2, "batch_size": 1, "n_contexts": 0, "before": 0, "after": 0, "live_rows": 1, "max_live": 1, "commit_seconds": 0,
            "memory": LEAST_MEMORY,
        }  # fmt: skip
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise BadStatisticsOptions(f"{name} is {getattr(self, name)}: it must be at least {bound}")
        if not 0 <= self.min_frequency <= 1:
            raise BadStatisticsOptions(f"min_frequency is {self.min_frequency}: it is a share of tokens, between 0 and 1")
        if self.skip_positions is not None and self.skip_positions < 0:
            raise BadStatisticsOptions(f"skip_positions is {self.skip_positions}: it must be at least 0")
        if self.between is not Between.NONE and not self.second_moments:
            raise BadStatisticsOptions(f"between is {self.between}, but second moments are not measured: ask for them, or for between none")

    @property
    def rule(self) -> LiveRule | None:
        return LiveRule(self.live_rows, self.min_frequency, self.max_live) if self.second_moments else None
