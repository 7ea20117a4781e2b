"""Baselines: what every node of a site, its features and its error node, is worth where it is not alive or not yet moved.

A baseline is a value for nodes, never for the site's own value, which follows: x = b_dec + Σ node · W_dec + error.

- counterfactual, resample: the nodes of the corrupted prompt's run, or of another prompt's. Before the first differing token both runs
  are equal by causality, so there the nodes are the clean ones, bit by bit: rounding must not say otherwise.
- zero: every node 0, hence x = b_dec.
- mean: the nodes' means over a corpus, over positions or for each position; a position that was not measured takes the former.
- noise: the clean node plus scale · σ · N(0, 1), σ its standard deviation over a corpus, for the error node that of each component of
  its vector. A pair's noise depends on the seed, the pair and the site: not on the batch that it comes in.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UserError
from .binding import Network, capture_sites
from .dictionaries import Dictionary
from .pairs import PairBatch
from .sites import Site


class UnavailableBaseline(UserError):
    """A baseline that was not given what it needs: means and deviations, or other sequences."""


class ForeignMoments(UserError):
    """Means or deviations of a dictionary of another width."""


class Baseline(StrEnum):
    """The value that nodes are moved from, and that dead nodes have."""

    COUNTERFACTUAL = "counterfactual"  # the corrupted sequence's nodes
    ZERO = "zero"  # every node 0, hence x = b_dec
    MEAN = "mean"  # the nodes' means over a corpus
    RESAMPLE = "resample"  # another sequence's nodes
    NOISE = "noise"  # the clean nodes, each with normal noise of its own deviation over a corpus

    @property
    def of_corpus(self) -> bool:
        """Whether it needs the nodes' moments over a corpus."""
        return self in (Baseline.MEAN, Baseline.NOISE)

    @property
    def drawn(self) -> bool:
        """Whether it is random, one draw for each seed."""
        return self in (Baseline.RESAMPLE, Baseline.NOISE)


@dataclass(frozen=True, eq=False)
class NodeMoments:
    """Means and standard deviations of a site's nodes over a corpus.

    features, features_std: (d_sae,). error, error_std: (d_in,), per component of the error vector. position_features (pos, d_sae),
    position_errors (pos, d_in): means per position, those over all positions where none was measured. Deviations are for noise only.
    """

    features: Tensor
    error: Tensor
    features_std: Tensor | None = None
    error_std: Tensor | None = None
    position_features: Tensor | None = None
    position_errors: Tensor | None = None

    @classmethod
    def of(cls, features: NDArray, error: NDArray, **others: NDArray | None) -> Self:
        """Those of numpy arrays of these names: `of(**vars(…))` takes what the statistics store reads for a baseline."""
        tensors = {name: None if array is None else torch.tensor(array) for name, array in others.items()}
        return cls(torch.tensor(features), torch.tensor(error), **tensors)

    def check_widths(self, dictionary: Dictionary, site: Site) -> None:
        """Raise `ForeignMoments` where a width is not the dictionary's."""
        widths = {
            "features": dictionary.d_sae, "features_std": dictionary.d_sae, "position_features": dictionary.d_sae,
            "error": dictionary.d_in, "error_std": dictionary.d_in, "position_errors": dictionary.d_in,
        }  # fmt: skip
        for name, width in widths.items():
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape[-1] != width:
                raise ForeignMoments(
                    f"{name} of {site.name} has width {tensor.shape[-1]}, and dictionary {dictionary.id} {width}: "
                    "take statistics measured with this dictionary"
                )

    def mean(self, like: Tensor, per_position: bool) -> tuple[Tensor, Tensor]:
        """Mean features (1, 1 or pos, d_sae) and errors (1, 1 or pos, d_in), in the type and place of a site's value `like` (batch, pos, d_in)."""
        if not per_position:
            return self.features.to(like)[None, None], self.error.to(like)[None, None]
        assert self.position_features is not None  # the choice has checked
        assert self.position_errors is not None
        n_pos = like.shape[1]
        features = _extended(self.position_features, self.features, n_pos)
        return features.to(like)[None], _extended(self.position_errors, self.error, n_pos).to(like)[None]


def _extended(by_position: Tensor, overall: Tensor, n_pos: int) -> Tensor:
    """Means of the first `n_pos` positions, (n_pos, width), the overall ones behind the last that was measured."""
    missing = max(0, n_pos - len(by_position))
    return torch.cat([by_position[:n_pos], overall.expand(missing, -1)])


@dataclass(frozen=True, eq=False)
class NodeValues:
    """One site's nodes: features (batch or 1, pos or 1, d_sae), errors (batch or 1, pos or 1, d_in).

    origin: the site's own value (batch, pos, d_in) where the nodes are those of a run; the clean value, bit by bit, where the runs are equal.
    """

    features: Tensor
    error: Tensor
    origin: Tensor | None = None

    def value(self, dictionary: Dictionary) -> Tensor:
        """The site's value with these nodes, b_dec + Σ node · W_dec + error: `origin`, or (batch or 1, pos or 1, d_in)."""
        return dictionary.decode(self.features) + self.error if self.origin is None else self.origin

    def same(self, clean: Tensor) -> Tensor | None:
        """Where a run's value is the clean one (batch, pos, d_in), so that no node differs, bool (batch, pos); None where there is no run."""
        return None if self.origin is None else (self.origin == clean).all(-1)


@dataclass(frozen=True)
class BaselineChoice:
    """One draw of a baseline.

    per_position: means for each position, for `mean`. noise_scale: in standard deviations, for `noise`. seed: of the noise; donors are
    drawn where batches are made.
    """

    baseline: Baseline = Baseline.COUNTERFACTUAL
    per_position: bool = False
    noise_scale: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raise a `UserError` for a choice that means nothing."""
        if not 0 < self.noise_scale < float("inf"):
            raise UserError(f"noise of {self.noise_scale} standard deviations is none: give a finite scale above 0")
        if self.per_position and self.baseline is not Baseline.MEAN:
            raise UserError(f"means per position are of baseline mean, not of {self.baseline.value}: take that one, or leave them out")

    def tokens(self, pairs: PairBatch) -> Tensor | None:
        """The prompts that nodes are taken from (batch, pos); None where they come from nowhere else. Raises `UnavailableBaseline`."""
        if self.baseline is Baseline.COUNTERFACTUAL:
            return pairs.corrupt
        if self.baseline is not Baseline.RESAMPLE:
            return None
        if pairs.donor is None:
            raise UnavailableBaseline("the resample baseline needs another sequence for each: batches must be made with donors")
        return pairs.donor

    def check_moments(self, site: Site, dictionary: Dictionary, moments: NodeMoments | None) -> None:
        """Raise `UnavailableBaseline` where mean or noise lacks something of a site's moments, `ForeignMoments` where they are of another width."""
        if not self.baseline.of_corpus:
            return
        if moments is None:
            what = "means" if self.baseline is Baseline.MEAN else "standard deviations"
            raise UnavailableBaseline(
                f"the {self.baseline.value} baseline needs the nodes' {what} at {site.name}: "
                "run `featlas ingest statistics` and name its run by --statistics-run"
            )
        moments.check_widths(dictionary, site)
        if self.baseline is Baseline.NOISE and (moments.features_std is None or moments.error_std is None):
            raise UnavailableBaseline(f"the noise baseline needs the nodes' standard deviations at {site.name}: only their means were given")
        if self.per_position and (moments.position_features is None or moments.position_errors is None):
            raise UnavailableBaseline(
                f"means per position were not measured at {site.name}: "
                "run `featlas ingest statistics` with --by-position, or take the means over positions"
            )

    def nodes(
        self, site: Site, dictionary: Dictionary, pairs: PairBatch, clean: Tensor, other: Tensor | None = None, moments: NodeMoments | None = None
    ) -> NodeValues:
        """The baseline of one site's nodes.

        clean: the site's value in the clean run, (batch, pos, d_in); other: in the run of `tokens`, where there are some.
        Raises `UnavailableBaseline` without the moments that mean and noise need, `ForeignMoments` where they are of another width.
        """
        tokens = self.tokens(pairs)
        if tokens is not None:
            assert other is not None  # the caller ran them
            return _run_nodes(dictionary, clean, other, (tokens.to(clean.device) != pairs.clean.to(clean.device))[:, : clean.shape[1]])
        if self.baseline is Baseline.ZERO:
            return NodeValues(clean.new_zeros(1, 1, dictionary.d_sae), clean.new_zeros(1, 1, dictionary.d_in))
        self.check_moments(site, dictionary, moments)
        assert moments is not None
        if self.baseline is Baseline.MEAN:
            return NodeValues(*moments.mean(clean, self.per_position))
        return self._noisy(site, dictionary, pairs, clean, moments)

    def _noisy(self, site: Site, dictionary: Dictionary, pairs: PairBatch, clean: Tensor, moments: NodeMoments) -> NodeValues:
        """The clean nodes with noise."""
        assert moments.features_std is not None  # the caller has checked
        assert moments.error_std is not None
        n_pos, width = clean.shape[1], dictionary.d_sae + dictionary.d_in
        # Drawn for whole sequences, so that values cut to a few positions have the noise of the uncut ones.
        drawn = [_noise(f"{self.seed}:{pair.key}:{site.name}", pairs.clean.shape[1], width)[:n_pos] for pair in pairs.pairs]
        noise = torch.stack(drawn).to(clean)  # (batch, pos, width)
        features, error = noise.split([dictionary.d_sae, dictionary.d_in], dim=-1)
        nodes = dictionary.encode(clean)  # (batch, pos, d_sae)
        return NodeValues(
            nodes + self.noise_scale * moments.features_std.to(clean) * features,
            clean - dictionary.decode(nodes) + self.noise_scale * moments.error_std.to(clean) * error,
        )


def _noise(name: str, n_pos: int, width: int) -> Tensor:
    """Independent N(0, 1), (pos, width) in float32 on the CPU, the same for the same name whatever the model's device and precision."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
    return torch.randn(n_pos, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def _run_nodes(dictionary: Dictionary, clean: Tensor, other: Tensor, differs: Tensor) -> NodeValues:
    """The nodes of another run, (batch, pos, d_in) `other`; the clean ones before the first token that `differs` (batch, pos)."""
    changed = differs.cummax(dim=1).values  # (batch, pos)
    value = torch.where(changed[..., None], other, clean)
    # Encoded in the clean value's own shape, equal rows give equal nodes to the last bit.
    features = dictionary.encode(value)  # (batch, pos, d_sae)
    return NodeValues(features, value - dictionary.decode(features), value)


@torch.no_grad()
def baseline_nodes(
    binding: Network,
    dictionaries: Mapping[Site, Dictionary],
    pairs: PairBatch,
    clean: Mapping[Site, Tensor],
    baseline: Baseline,
    *,
    moments: Mapping[Site, NodeMoments] | None = None,
    per_position: bool = False,
    noise_scale: float = 1.0,
    seed: int = 0,
) -> dict[Site, NodeValues]:
    """One draw of a baseline for every node of the sites that `clean`, their values in the clean run (batch, pos, d_in), and `dictionaries` have.

    The counterfactual's and the donors' runs are made here, once for all sites. Another draw is another `seed` for noise, and batches made
    with another `donor_seed` for resampling. Raises `UnavailableBaseline`, `ForeignMoments`, and a `UserError` for a choice out of range.
    """
    choice = BaselineChoice(baseline, per_position, noise_scale, seed)
    choice.check()
    sites = {site: dictionary for site, dictionary in dictionaries.items() if site in clean}
    tokens = choice.tokens(pairs)
    if tokens is not None:  # what lies behind the clean values' end changes nothing before it
        tokens = tokens[:, : max((value.shape[1] for value in clean.values()), default=0)]
    other = {} if tokens is None else capture_sites(binding, tokens, {site: dictionary.basis for site, dictionary in sites.items()})
    return {
        site: choice.nodes(site, dictionary, pairs, clean[site], other.get(site), (moments or {}).get(site))
        for site, dictionary in sites.items()
    }  # fmt: skip
