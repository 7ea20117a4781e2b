"""All records of a stretch of sequences together: those of each site (`moments`) and those of the sites together (`products`).

The single pass fills one such record from the first sequence to the last; a shard fills one of its own, which is merged. What a record
holds goes out and comes back as named pieces of bytes, so that the statistics store and a shard's folder keep it in the same form.
"""

from collections.abc import Mapping

import torch

from ..errors import FeatlasError
from ..model.sites import Site
from .moments import NotFinite, SiteShape, SiteStatistics, SparseNodes, Window
from .products import Collected, JointMoments, packed, unpacked

JOINT = "second moments"
"""The part of a saved state that is of all sites together."""


class StateDoesNotFit(FeatlasError):
    """A saved state ends inside a batch, or is of other nodes: the file was changed from outside."""


class Records:
    """The records of the sequences from `first` on, before `sequences`; `joint` is None where no second moments are measured."""

    def __init__(
        self, shapes: Mapping[Site, SiteShape], joint: JointMoments | Collected | None, device: torch.device, *, first: int = 0
    ) -> None:
        self.shapes, self.joint, self.device = shapes, joint, device
        self.first, self.sequences, self.tokens = first, first, 0
        self.sites = {site: SiteStatistics.empty(shape, device) for site, shape in shapes.items()}

    def add(self, window: Window, nodes: Mapping[Site, SparseNodes]) -> None:
        """Take the batch whose sequences come next; raises `NotFinite` naming the site and the sequences."""
        n = len(window.tokens)
        for site, statistics in self.sites.items():
            try:
                statistics.add(nodes[site].to(self.device), window)
            except NotFinite as error:
                raise NotFinite(f"site {site}, sequences {self.sequences} to {self.sequences + n - 1}: {error}") from None
        if self.joint is not None:
            self.joint.add({site.name: nodes[site] for site in self.sites}, window.n_positions)
        self.sequences += n
        self.tokens += n * window.n_positions

    def merge(self, other: "Records") -> None:
        """Take in the record of the sequences that come next."""
        if other.first != self.sequences:
            raise StateDoesNotFit(f"records of sequences from {other.first} on were to be merged after {self.sequences} sequences")
        self.sites = {site: statistics.merge(other.sites[site]) for site, statistics in self.sites.items()}
        if isinstance(self.joint, JointMoments) and other.joint is not None:
            if isinstance(other.joint, Collected):
                for batch in other.joint.batches():
                    self.joint.take(batch)
            else:
                self.joint.merge(other.joint)
        self.sequences, self.tokens = other.sequences, self.tokens + other.tokens

    # -- committing ------------------------------------------------------------------------------------------

    def save(self) -> dict[str, bytes]:
        """Part → what `restore` needs of it; to be committed with `sequences` and `tokens`, then `cleaned`."""
        state = {site.name: packed(statistics.to_arrays()) for site, statistics in self.sites.items()}
        return state | ({JOINT: packed(self.joint.save())} if self.joint is not None else {})

    def cleaned(self) -> None:
        """After the commit: remove the files that it no longer names."""
        if self.joint is not None:
            self.joint.cleaned()

    def restore(self, state: Mapping[str, bytes], sequences: int, tokens: int) -> None:
        """Go on from what `save` returned. Raises `StateDoesNotFit` and `PartsMissing`."""
        if self.joint is not None and JOINT not in state:
            raise StateDoesNotFit("it was begun by an older featlas")
        self.sites = {site: SiteStatistics.from_arrays(shape, unpacked(state[site.name]), self.device) for site, shape in self.shapes.items()}
        if self.joint is not None:
            self.joint.restore(unpacked(state[JOINT]))
        self.sequences, self.tokens = sequences, tokens
