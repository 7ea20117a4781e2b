"""How good dictionaries are, measured on text that they did not see.

1. Reconstruction, one run of the model for all sites: FVU (share of the variance that stays unexplained), L0 (features
   active at a position), and the share of features that were never active.
2. Loss recovered, one site at a time: (CE_zero − CE_spliced) / (CE_zero − CE_clean), where the next-token cross-entropy is
   taken clean, with the site's values replaced by their reconstruction, and with them replaced by 0.

Position 0 and positions of outlying norm are left out, and left as they are when the others are replaced: dictionaries are not
trained on them (see `training`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from ..errors import UserError
from .binding import Binding, Patch, bind, capture_sites
from .dictionaries import Dictionary, computed
from .dictionary_sources import SiteDictionaries
from .loading import LoadedModel
from .sites import Basis, Site, SiteKind
from .training import OUTLIER_RATIO


class NothingToEvaluate(UserError):
    """There is no text, or too little, to measure on."""


@dataclass(frozen=True, slots=True)
class Quality:
    """Measured quality of one site's dictionary.

    fvu: fraction of variance unexplained, 0 is perfect and 1 no better than the mean. l0: mean number of active features at
    a position. dead_share: share of features active at none of the `positions`. outliers: positions left out for their norm.
    loss_*: mean next-token cross-entropy in nats over `loss_positions`, NaN where it was not asked for.
    """

    site: Site
    dictionary: str
    fvu: float
    l0: float
    dead_share: float
    positions: int
    outliers: int
    loss_clean: float
    loss_spliced: float
    loss_zero: float
    loss_positions: int

    @property
    def loss_recovered(self) -> float:
        """(CE_zero − CE_spliced) / (CE_zero − CE_clean): 1 is perfect, 0 no better than zeros."""
        return (self.loss_zero - self.loss_spliced) / (self.loss_zero - self.loss_clean)


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """What step 1 measures."""

    fvu: float
    l0: float
    dead_share: float
    positions: int
    outliers: int


def evaluate_dictionaries(
    model: LoadedModel, dictionaries: SiteDictionaries, sequences: Iterable[Tensor], *, loss_tokens: int = 5000, batch: int = 16
) -> tuple[Quality, ...]:
    """Quality of every dictionary on token sequences, each int64 (pos,).

    The loss is measured on the sequences up to `loss_tokens` tokens (0: not at all), since it takes two runs of the model a
    site. Raises `NothingToEvaluate` where no position is left.
    """
    binding = bind(model)
    groups = list(_groups(sequences, batch))
    measured = reconstruct(binding, dictionaries, groups)
    part = _first_tokens(groups, loss_tokens)
    clean = cross_entropy(binding, part, {}) if part else (float("nan"), 0)
    found = []
    for site in dictionaries.sites:
        replaced = [{site: (dictionaries[site].basis, patch)} for patch in (_spliced(dictionaries[site]), _zeroed)]
        losses = [cross_entropy(binding, part, what)[0] if part else float("nan") for what in replaced]
        seen = measured[site]
        found.append(
            Quality(
                site=site,
                dictionary=dictionaries[site].id,
                fvu=seen.fvu,
                l0=seen.l0,
                dead_share=seen.dead_share,
                positions=seen.positions,
                outliers=seen.outliers,
                loss_clean=clean[0],
                loss_spliced=losses[0],
                loss_zero=losses[1],
                loss_positions=clean[1],
            )
        )
    return tuple(found)


def _groups(sequences: Iterable[Tensor], batch: int) -> Iterator[Tensor]:
    """Batches (batch, pos) of sequences of equal length, from a window of many."""
    stream = iter(sequences)
    while window := list(islice(stream, 16 * batch)):
        lengths = sorted({len(sequence) for sequence in window if len(sequence) > 1})
        for length in lengths:
            alike = torch.stack([sequence for sequence in window if len(sequence) == length])
            yield from alike.split(batch)


def _first_tokens(groups: Sequence[Tensor], limit: int) -> list[Tensor]:
    """Batches spread over all groups, with at most about `limit` tokens; at least one unless the limit is 0."""
    total = sum(group.numel() for group in groups)
    if limit <= 0 or not groups:
        return []
    stride = max(1, -(-total // limit))
    return list(groups[::stride])


# --- 1. Reconstruction -----------------------------------------------------------------------------------------------


def reconstruct(binding: Binding, dictionaries: SiteDictionaries, groups: Iterable[Tensor]) -> dict[Site, Reconstruction]:
    """FVU, L0 and dead share of every site on batches of tokens (batch, pos)."""
    bases: dict[Site, Basis] = {site: dictionaries[site].basis for site in dictionaries.sites}
    sums = {site: _Sums(dictionaries[site]) for site in dictionaries.sites}
    for group in groups:
        for site, value in capture_sites(binding, group.to(binding.device), bases).items():
            sums[site].add(value)
    return {site: total.result(site) for site, total in sums.items()}


class _Sums:
    """Running sums over positions of one site; in float64, so that the variance of large means is right."""

    def __init__(self, dictionary: Dictionary) -> None:
        self.dictionary = dictionary
        self.count = self.outliers = 0
        self.active = torch.zeros(dictionary.d_sae, dtype=torch.int64)
        self.total = torch.zeros(dictionary.d_in, dtype=torch.float64)
        self.squares = self.unexplained = 0.0

    def add(self, value: Tensor) -> None:
        """Count the positions of one batch, (batch, pos, width)."""
        kept = usual_positions(value)
        x = computed(value[kept])  # (n, width)
        with torch.no_grad():
            nodes = self.dictionary.encode(x)
            error = (x - self.dictionary.decode(nodes)).double()
        self.count += len(x)
        self.outliers += int((~kept[:, 1:]).sum())
        self.active += (nodes != 0).sum(0).cpu()
        self.total += x.double().sum(0).cpu()
        self.squares += float(x.double().square().sum())
        self.unexplained += float(error.square().sum())

    def result(self, site: Site) -> Reconstruction:
        if self.count < 2:
            raise NothingToEvaluate(f"no positions to evaluate {site.name} on: give texts of two tokens and more")
        variance = self.squares - float(self.total.square().sum()) / self.count
        return Reconstruction(
            fvu=self.unexplained / variance,
            l0=float(self.active.sum()) / self.count,
            dead_share=float((self.active == 0).double().mean()),
            positions=self.count,
            outliers=self.outliers,
        )


def usual_positions(value: Tensor) -> Tensor:
    """Positions that dictionaries are trained on, bool (batch, pos) of a site's value (batch, pos, width)."""
    norms = value.detach().float().norm(dim=-1)  # (batch, pos)
    kept = norms <= OUTLIER_RATIO * norms[:, 1:].median()
    kept[:, 0] = False
    return kept


# --- 2. Loss ---------------------------------------------------------------------------------------------------------


def _spliced(dictionary: Dictionary) -> Patch:
    def patch(value: Tensor) -> Tensor:
        rebuilt = dictionary.decode(dictionary.encode(value))
        return torch.where(usual_positions(value)[..., None], rebuilt, value)

    return patch


def _zeroed(value: Tensor) -> Tensor:
    return torch.where(usual_positions(value)[..., None], 0.0, value)


def cross_entropy(binding: Binding, groups: Iterable[Tensor], replaced: Mapping[Site, tuple[Basis, Patch]]) -> tuple[float, int]:
    """Mean next-token cross-entropy (nats) after position 0 on batches of tokens, with sites replaced, and over how many positions."""
    last = Site(SiteKind.RESID, binding.n_layers - 1)
    bases = {site: basis for site, (basis, _) in replaced.items()} | {last: Basis.RESIDUAL}
    patches = {site: patch for site, (_, patch) in replaced.items()}
    total, count = 0.0, 0
    for group in groups:
        tokens = group.to(binding.device)
        with torch.no_grad():
            run = binding.forward(tokens, bases, patches=patches, stop_early=True)
            logits = binding.logits(run.values[last][:, 1:-1]).float()  # (batch, pos - 2, vocab)
        target = tokens[:, 2:]
        if target.numel():
            total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum"))
            count += target.numel()
    if not count:
        raise NothingToEvaluate("no position to take a loss at: give texts of three tokens and more")
    return total / count, count
