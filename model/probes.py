"""Linear probes: logistic regression on a site's value at one position, saved as `--target` and `model.targets.read_probe` take it.

1. `probe_values`: the model's values of one site at one position of each text, texts of equal length together, without padding.
2. `train_probe`: mean log loss + ½ l2 |w|² over standardised components, a convex problem without randomness, by L-BFGS in float64. The
   standardisation is folded into weight and bias afterwards, so that the probe reads the value as it is.
3. `probe_accuracy`: the share of texts on the right side of 0, over all and by group, the worst group among them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import FeatlasError, UserError
from ..files import whole
from .binding import Binding, capture_sites
from .sites import Basis, Site
from .targets import PROBE_SUFFIX, ProbeTarget

ACCURACY = {"group": pl.String, "n": pl.Int64, "accuracy": pl.Float64}

_MAX_STEPS = 1000
_GRADIENT = 1e-7  # of the loss, in standardised components: 0 at the minimum
_SAME = 1e-6  # a component whose deviation is below this part of the greatest is constant: it says nothing


class BadTraining(UserError):
    """Examples or options that no probe can be trained with."""


class NotConverged(FeatlasError):
    """The training ended above its tolerance."""


@dataclass(frozen=True)
class ProbeOptions:
    """l2: weight of the penalty, on standardised components. position: that is read, from 0, or from −1 backwards."""

    l2: float = 1e-2
    position: int = -1

    def check(self) -> None:
        """Raise `BadTraining` for a penalty without which separable classes have no minimum."""
        if not 0 < self.l2 < float("inf"):
            raise BadTraining(f"a penalty of {self.l2} gives no probe: take a finite one above 0")


@torch.no_grad()
def probe_values(
    binding: Binding, tokenizer: Any, texts: Sequence[str], site: Site, *, basis: Basis = Basis.RESIDUAL, position: int = -1, batch_size: int = 32
) -> Tensor:
    """The site's value at `position` of each text, (texts, width), in the order of the texts. Raises `BadTraining` for a text too short."""
    if not texts:
        raise BadTraining("there are no texts to read a site's values of")
    ids = tokenizer(list(texts), add_special_tokens=True)["input_ids"]
    place = position if position >= 0 else -position - 1
    if short := next((text for text, tokens in zip(texts, ids, strict=True) if len(tokens) <= place), None):
        raise BadTraining(f"the text {short!r} is too short for a probe at position {position}")
    values = torch.empty(len(texts), binding.width(site, basis), dtype=binding.dtype, device=binding.device)
    for rows in _equal_lengths(ids, batch_size):
        tokens = torch.tensor([ids[i] for i in rows], device=binding.device)  # (batch, pos)
        values[rows] = capture_sites(binding, tokens, {site: basis})[site][:, position]
    return values


def _equal_lengths(ids: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Places of texts of equal length, at most `batch_size` at a time."""
    by_length: dict[int, list[int]] = {}
    for i, tokens in enumerate(ids):
        by_length.setdefault(len(tokens), []).append(i)
    for length in sorted(by_length):
        rows = by_length[length]
        yield from (rows[low : low + batch_size] for low in range(0, len(rows), batch_size))


def train_probe(values: Tensor, labels: Sequence[int], site: Site, name: str, options: ProbeOptions | None = None) -> ProbeTarget:
    """The probe whose value is positive where the label is 1 and negative where it is 0; values (n, width), in the residual basis.

    Raises `BadTraining` where there are not both labels, `NotConverged` where the minimum was not reached.
    """
    options = options or ProbeOptions()
    options.check()
    truth = torch.as_tensor(labels, dtype=torch.float64)
    if len(truth) != len(values) or not bool(((truth == 0) | (truth == 1)).all()):
        raise BadTraining(f"{len(values)} values and {len(truth)} labels: each value has a label, 0 or 1")
    if not 0 < float(truth.mean()) < 1:
        raise BadTraining(f"all {len(truth)} examples have one label: a probe tells two apart")
    x = values.detach().cpu().double()
    mean, std = x.mean(0), x.std(0, correction=0)
    scale = torch.where(std > _SAME * std.max(), std, torch.inf)  # (width,)
    weight, bias = _logistic_regression((x - mean) / scale, truth, options.l2)
    weight = weight / scale
    return ProbeTarget(site, weight.to(values), (bias - mean @ weight).to(values), options.position, name)


def _logistic_regression(x: Tensor, truth: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """Weight (width,) and bias () of the minimum of the mean log loss + ½ l2 |w|²."""
    weight, bias = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True), torch.zeros((), dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=_MAX_STEPS, history_size=20, tolerance_grad=_GRADIENT / 10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(x @ weight + bias, truth) + 0.5 * l2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
        loss()
    assert weight.grad is not None
    assert bias.grad is not None
    slope = max(float(weight.grad.abs().max()), float(bias.grad.abs()))
    if not slope <= _GRADIENT:
        raise NotConverged(f"logistic regression stopped at a gradient of {slope:.1e} (wanted {_GRADIENT:.0e}): take a larger penalty")
    return weight.detach(), bias.detach()


def save_probe(probe: ProbeTarget, path: str | Path) -> None:
    """Write the probe as `read_probe` reads it: tensors `weight` and `bias`, in the metadata site, name, position and basis."""
    if not str(path).endswith(PROBE_SUFFIX):
        raise BadTraining(f"a probe is saved in a {PROBE_SUFFIX} file, by which it is known as one: not in {path}")
    metadata = {"site": probe.site.name, "name": probe.label, "position": str(probe.pos), "basis": probe.basis.value}
    with whole(Path(path)) as part:
        save_file({"weight": probe.weight.cpu().contiguous(), "bias": probe.bias.cpu().reshape(1)}, part, metadata=metadata)


def probe_accuracy(probe: ProbeTarget, values: Tensor, labels: Sequence[int], groups: Sequence[str]) -> pl.DataFrame:
    """The share of values (n, width) on their label's side of 0: all (`group` null) first, then by group, the worst first, as `ACCURACY`."""
    right = ((values @ probe.weight + probe.bias > 0).long().cpu() == torch.as_tensor(labels)).tolist()
    rows = pl.DataFrame({"group": list(groups), "right": right}, schema={"group": pl.String, "right": pl.Boolean})
    figures = (pl.len().cast(pl.Int64).alias("n"), pl.col("right").mean().alias("accuracy"))
    by_group = rows.group_by("group").agg(*figures).sort("accuracy", "group")
    return pl.concat([rows.select(pl.lit(None, pl.String).alias("group"), *figures), by_group])
