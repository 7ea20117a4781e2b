"""What an attribution run computes: its settings, and the errors that the engine raises."""

from dataclasses import dataclass, fields
from enum import StrEnum

import torch

from ..errors import FeatlasError, UserError
from ..model.baselines import Baseline, BaselineChoice, UnavailableBaseline
from ..model.metrics import Metric, require_attribution_metric
from .ranges import check_numbers

__all__ = [
    "DEFAULT_MEMORY", "DEFAULT_STEPS", "Baseline", "EdgeSettings", "FirstFactor", "InconsistentSite", "NotFinite", "Positions",
    "TooManyEdges", "UnavailableBaseline", "ZeroGradient",
]  # fmt: skip

DEFAULT_STEPS = 10
DEFAULT_MEMORY = 2**31
"""Bytes for working tensors, unless told."""


class ZeroGradient(FeatlasError):
    """The metric does not depend on a chosen site: every attribution through it would be zero."""


class NotFinite(FeatlasError):
    """A gradient or a node's change is NaN or infinite: comparisons with it would silently drop or keep edges."""


def wider(kind: torch.dtype) -> str:
    """The way out where numbers of a type are not finite."""
    if kind not in (torch.float32, torch.float64):
        return "take --dtype float32"
    return "a dictionary's or the model's weights are too large: `featlas dictionaries evaluate` looks at them"


class InconsistentSite(FeatlasError):
    """A site recomputed from its parents' clean values is not what the model computed."""


class TooManyEdges(UserError):
    """The edges of one batch do not fit into the memory allowed."""


class Positions(StrEnum):
    """What becomes of token positions in the edges."""

    SUM = "sum"  # kept effects are added over positions
    MAX = "max"  # the signed effect of greatest magnitude
    KEEP = "keep"  # every position pair is an edge of its own


class FirstFactor(StrEnum):
    """How ∂m/∂f_d at f_d(α) is found for the steps before the clean run (at the clean run it is known)."""

    EXACT = "exact"  # one run of the model's tail per node and step
    INTERPOLATED = "interpolated"  # features: one run per node at the end of its range, a curve between; errors exact
    CLEAN = "clean"  # its value at the clean run


@dataclass(frozen=True)
class EdgeSettings:
    """What an attribution run computes.

    steps: S of integrated gradients, α = 1/S … 1; 1 is attribution patching, at the clean run alone.
    threshold: 0 keeps every edge with an effect. max_edges: kept per downstream node and position, None keeps all.
    tolerance: for the interpolated first factor, the relative error (as estimated for each node) above which a third point, and where
    that is not enough every step, is computed.
    screen: expand only downstream nodes into which an edge of at least this |effect| leads in a first pass by the clean first factor
    at the two ends of the path, and that are reached through such edges; None expands all.
    tail_dtype: half precision for the runs of the model's tail ("bfloat16", "float16"); None is the model's own.
    per_position: the mean baseline's means are each position's. noise_scale, noise_seed: of the noise baseline, in standard deviations.
    memory: bytes that a batch's working tensors may take, beside the model and its dictionaries; no part of what is computed.
    """

    metric: Metric = Metric.LOGIT_DIFF
    baseline: Baseline = Baseline.COUNTERFACTUAL
    steps: int = DEFAULT_STEPS
    threshold: float = 0.0
    max_edges: int | None = None
    positions: Positions = Positions.SUM
    first_factor: FirstFactor = FirstFactor.EXACT
    tolerance: float = 0.02
    screen: float | None = None
    tail_dtype: str | None = None
    per_position: bool = False
    noise_scale: float = 1.0
    noise_seed: int = 0
    memory: int = DEFAULT_MEMORY

    @property
    def choice(self) -> BaselineChoice:
        """The baseline with what belongs to it."""
        return BaselineChoice(self.baseline, self.per_position, self.noise_scale, self.noise_seed)

    @property
    def identity(self) -> dict[str, object]:
        """What determines the edges, JSON-able: everything but `memory`; nothing of what another baseline, or one step, does not use."""
        described = {field.name: getattr(getattr(self, field.name), "value", getattr(self, field.name)) for field in fields(self)}
        del described["memory"]
        if not self.per_position:
            del described["per_position"]
        if self.baseline is not Baseline.NOISE:
            del described["noise_scale"], described["noise_seed"]
        if self.first_factor is not FirstFactor.INTERPOLATED:
            del described["tolerance"]
        if self.first_factor is FirstFactor.CLEAN:
            del described["tail_dtype"]
        if self.steps == 1:
            for name in ("first_factor", "tolerance", "tail_dtype"):
                described.pop(name, None)
        return described

    @property
    def tail_type(self) -> torch.dtype | None:
        """`tail_dtype` as torch's."""
        return None if self.tail_dtype is None else {"bfloat16": torch.bfloat16, "float16": torch.float16}[self.tail_dtype]

    def check(self) -> None:
        """Raise a `UserError` for a setting out of range."""
        check_numbers(
            steps=self.steps, threshold=self.threshold, max_edges=self.max_edges, tolerance=self.tolerance, screen=self.screen, memory=self.memory,
        )  # fmt: skip
        self.choice.check()
        if self.tail_dtype not in (None, "bfloat16", "float16"):
            raise UserError(f"--tail-dtype {self.tail_dtype} is unknown: give bfloat16 or float16, or leave it out for the model's own")
        if self.tail_dtype is not None and self.first_factor is FirstFactor.INTERPOLATED:
            raise UserError("--tail-dtype rounds away the changes from which --first-factor interpolated has its curve and error: take one of them")
        require_attribution_metric(self.metric, self.steps)
        if self.metric in (Metric.KL, Metric.TV) and (self.first_factor is FirstFactor.CLEAN or self.screen is not None):
            option = "--screen" if self.screen is not None else "--first-factor clean"
            raise UserError(f"{option} goes by the gradient at the clean run, where that of metric {self.metric.value!r} is zero: leave it out")
