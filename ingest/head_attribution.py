"""What attention heads contribute to features, measured: attribution from heads to features, and the heads' parts of what encoders read.

- `effective`: heads are sets of neurons of the attention layers' outputs (identity dictionaries on hook_z), features those of a later site.
  The attribution from a head to a feature is the sum over the head's neurons and over positions at threshold 0, for each sequence; its
  magnitude is added over sequences. The heads are those of the layers that write the site.
- `encoder`: of an attention site's own features, by its own heads. What a feature's encoder reads is linear in the heads' outputs:
  e_f · P W_O (z − z_base) is a sum over heads (P the linear part of a post-norm, whose scale is a position's own and the same for all heads),
  or e_f · (z − z_base), slice by slice, for a dictionary on the heads' outputs. Magnitudes are added over the positions at which the feature
  is active.
- `structural`: from the weights alone, the shares of `heads` by which heads write a feature.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UserError
from ..model.baselines import Baseline
from ..model.binding import Binding
from ..model.dictionaries import Dictionary, identity
from ..model.sites import Basis, Site, SiteGraph, SiteKind
from ..model.tasks import PairBatch
from ..model.units import Units
from ..model.units import heads as head_units
from ..model.weights import ModelWeights, computed, read_directions
from .budget import chunk
from .effective import prepare
from .heads import Role, head_layers, site_shares
from .settings import EdgeSettings
from .unit_edges import unit_columns

_SHARED_ROWS = 4096
"""Features whose structural shares are made at once."""


class NoHeadsBefore(UserError):
    """No attention head is known to write a site, or not by this method."""


class HeadSums(NamedTuple):
    """heads: (layer, head) of each column. magnitude: (d_sae, n_heads) float64. n: sequences or positions that were added."""

    heads: tuple[tuple[int, int], ...]
    magnitude: NDArray[np.float64]
    n: int


def writing_layers(binding: Binding, sites: Iterable[Site], site: Site) -> tuple[int, ...]:
    """The layers whose heads write a site: its own for attn_L; for resid_L those up to L above the chosen residual stream before it."""
    layers = head_layers(binding.graph({*sites, site}), site)[Role.WRITE]
    if not layers:
        raise NoHeadsBefore(f"no head writes {site.name} itself: name an attn_L or resid_L site")
    return layers


def effective_sums(
    binding: Binding, dictionary: Dictionary, site: Site, layers: Sequence[int], batches: Iterable[PairBatch], settings: EdgeSettings
) -> HeadSums:
    """Attribution from the heads of `layers` to the features of `site`, a resid_L, in their effect on the metric."""
    if site.kind is SiteKind.ATTN:
        raise NoHeadsBefore(f"the heads of {site.name} are that site itself: take --method encoder, which is exact there")
    sources = [Site(SiteKind.ATTN, layer) for layer in layers]
    neurons = identity(binding.d_heads, basis=Basis.HEADS, device=binding.device, dtype=binding.dtype)
    chosen: dict[Site, Dictionary] = {**dict.fromkeys(sources, neurons), site: dictionary}
    units = _units(binding.graph(chosen), chosen, site, binding.n_heads)
    total, n = np.zeros((dictionary.d_sae, len(sources) * binding.n_heads)), 0
    for batch in batches:
        prepared = prepare(binding, chosen, batch, replace(settings, screen=None))
        # the first site with units from y backwards is the last one: what leads into it is all that is needed
        for columns in unit_columns(prepared, units):
            if columns.site == site:
                found = columns.weight[:, :, : dictionary.d_sae].abs().sum(0)  # (units of all sources, d_sae)
                by_source = found.view(len(sources), binding.n_heads + 1, -1)[:, :-1]  # without the errors, which are 0
                total += by_source.flatten(0, 1).T.numpy()
                break
        n += len(batch.pairs)
    return HeadSums(tuple((layer, head) for layer in layers for head in range(binding.n_heads)), total, n)


def _units(graph: SiteGraph, dictionaries: Mapping[Site, Dictionary], target: Site, n_heads: int) -> Units:
    """Heads, and single features at the target."""
    labels, names = {}, {}
    for site, dictionary in dictionaries.items():
        if site == target:
            labels[site] = torch.arange(dictionary.d_sae + 1)
            names[site] = [*(f"{site.name}/{i}" for i in range(dictionary.d_sae)), f"{site.name}/error"]
        else:
            labels[site], names[site] = head_units(dictionary, site, n_heads)
    return Units.from_labels(graph, labels, names)


@torch.no_grad()
def encoder_sums(
    binding: Binding, dictionary: Dictionary, site: Site, batches: Iterable[PairBatch], *, baseline: Baseline = Baseline.COUNTERFACTUAL,
    memory: int = 2**31,
) -> HeadSums:  # fmt: skip
    """The heads' parts in what the encoders of an attention site's features read, where the features are active.

    baseline: what the heads' outputs are measured from, `counterfactual` (the corrupted sequence's) or `zero`.
    """
    if site.kind is not SiteKind.ATTN:
        raise NoHeadsBefore(f"{site.name} is not made of one layer's heads: take --method effective")
    if baseline not in (Baseline.COUNTERFACTUAL, Baseline.ZERO):
        raise NoHeadsBefore(f"--method encoder measures from the counterfactual or from zero, not from the {baseline.value} baseline")
    through = _through(binding, dictionary, site)  # (d_sae, n_heads, head_dim)
    total = torch.zeros(dictionary.d_sae, binding.n_heads, dtype=torch.float64)
    n = 0
    for batch in batches:
        z = binding.forward(batch.clean, {site: Basis.HEADS}, stop_early=True).values[site]
        moved = z
        if baseline is Baseline.COUNTERFACTUAL:
            moved = z - binding.forward(batch.corrupt, {site: Basis.HEADS}, stop_early=True).values[site]
        value = z if dictionary.basis is Basis.HEADS else binding.written(site, z, Basis.HEADS)
        changed = moved.any(-1)  # (batch, pos)
        value, change = value[changed], moved[changed].unflatten(-1, (binding.n_heads, -1))
        n += len(value)
        for part in torch.arange(len(value), device=z.device).split(chunk(memory, dictionary.d_sae * 2 * (1 + z.itemsize))):
            at, feature = dictionary.active(value[part]).nonzero(as_tuple=True)
            for some in torch.arange(len(at), device=z.device).split(chunk(memory, 3 * z.shape[-1] * z.itemsize)):
                parts = (change[part[at[some]]].to(through) * through[feature[some]]).sum(-1).abs()  # (m, n_heads)
                total.index_add_(0, feature[some].cpu(), parts.cpu().double())
    return HeadSums(tuple((site.layer, head) for head in range(binding.n_heads)), total.numpy(), n)


def _through(binding: Binding, dictionary: Dictionary, site: Site) -> Tensor:
    """What each feature's encoder reads of each head's output, (d_sae, n_heads, head_dim)."""
    read = read_directions(dictionary).to(binding.device)  # it may lie on its layer's device
    if dictionary.basis is Basis.HEADS:
        return read.view(len(read), binding.n_heads, -1)
    attention = ModelWeights(binding).attention(site.layer)
    return torch.einsum("nd,hde->nhe", attention.post.transposed(read), computed(attention.W_O))


def structural_sums(binding: Binding, dictionary: Dictionary, site: Site, sites: Iterable[Site]) -> HeadSums:
    """The heads' shares as writers of each feature, by the weights alone, every layer weighted the same."""
    layers = writing_layers(binding, sites, site)
    graph = binding.graph({*sites, site})
    total = np.zeros((dictionary.d_sae, len(layers) * binding.n_heads))
    for frame in site_shares(ModelWeights(binding), graph, {site: dictionary}, site, rows=_SHARED_ROWS, roles=(Role.WRITE,)):
        place = {layer: i for i, layer in enumerate(layers)}
        column = np.array([place[layer] for layer in frame["layer"]], dtype=np.int64) * binding.n_heads + frame["head"].to_numpy()
        total[frame["feature"].to_numpy(), column] = frame["share"].to_numpy()
    return HeadSums(tuple((layer, head) for layer in layers for head in range(binding.n_heads)), total, 0)
