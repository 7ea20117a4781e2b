"""Attention heads' shares in features, from the weights alone: which head of a layer writes a feature, and which reads it.

With N and P the linear parts of the norms before and after attention, w the feature's direction in the stream and e what its encoder
reads, head h of a layer has in the feature

- as its writer (`write`) |Nᵀ W_Vᵀ W_Oᵀ Pᵀ e|: the gradient of the feature with respect to what the head moves;
- as its reader (`value`) |P W_O W_V N w|: what the head makes of the feature where it attends to it;
- by its scores, `query` |Nᵀ W_Kᵀ W_Q N w| and `key` |Nᵀ W_Qᵀ W_K N w|: how the feature changes the head's scores as the attending
  position and as the one attended to, without rotation by positions and without biases.

A share is that over the sum of the layer's heads, so that the norms' scales drop out; and only products of two matrices count, so that
shares do not depend on how a head divides its size between them. What is |…| is never formed: its square is a form of the head's own size.
"""

from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum

import numpy as np
import polars as pl
import torch
from torch import Tensor

from ..model.dictionaries import Dictionary
from ..model.sites import OUTPUT, Basis, Site, SiteGraph, SiteKind
from ..model.weights import AttentionWeights, LinearNorm, ModelWeights, computed, read_directions, write_directions


class Role(StrEnum):
    """What a head does with a feature."""

    WRITE = "write"
    VALUE = "value"
    QUERY = "query"
    KEY = "key"


READING = (Role.VALUE, Role.QUERY, Role.KEY)


def head_layers(graph: SiteGraph, site: Site) -> dict[Role, tuple[int, ...]]:
    """The layers whose heads write the features of `site` or read them.

    Writing: of `attn_L` layer L; of `resid_L` the layers up to L from the next chosen stream site below. Reading: the layers above
    up to the next chosen `resid`, the next layer at least.
    """
    resid = [s.layer for s in graph.sites if s.kind is SiteKind.RESID]
    above = max(min((layer for layer in resid if layer > site.layer), default=graph.n_layers - 1), site.layer + 1)
    below = max((layer for layer in resid if layer < site.layer), default=-1)
    writing = {SiteKind.ATTN: range(site.layer, site.layer + 1), SiteKind.RESID: range(below + 1, site.layer + 1)}.get(site.kind, range(0))
    reading = range(site.layer + 1, min(above, graph.n_layers - 1) + 1)
    return {Role.WRITE: tuple(writing), **dict.fromkeys(READING, tuple(reading))}


@torch.no_grad()
def site_shares(
    weights: ModelWeights, graph: SiteGraph, dictionaries: Mapping[Site, Dictionary], site: Site, *, rows: int, roles: Sequence[Role] = tuple(Role)
) -> Iterator[pl.DataFrame]:
    """Shares of the heads in the features of one site, `rows` features at a time: feature, layer, head, role, share; of some roles, or all.

    A feature that no head of a layer has anything to do with (a dead one, say) has no rows for that layer and role.
    """
    dictionary = dictionaries[site]
    layers = {role: own for role, own in head_layers(graph, site).items() if role in roles}
    for start in range(0, dictionary.d_sae, rows):
        block = slice(start, min(start + rows, dictionary.d_sae))
        for layer in sorted({layer for of_role in layers.values() for layer in of_role}):
            attention = weights.attention(layer)
            for role in (role for role in Role if layer in layers.get(role, ())):
                strengths = _writing(attention, dictionary, block) if role is Role.WRITE else None
                if strengths is None:
                    strengths = _reading(attention, role, write_directions(dictionary, site, weights.attention, block))
                yield _frame(strengths, start, layer, role)


def shared_sites(graph: SiteGraph) -> tuple[Site, ...]:
    """The chosen sites whose features some head writes or reads."""
    return tuple(site for site in graph.sites if site != OUTPUT and any(head_layers(graph, site).values()))


def _writing(attention: AttentionWeights, dictionary: Dictionary, block: slice) -> Tensor:
    """|Nᵀ W_Vᵀ W_Oᵀ Pᵀ e| of each feature and head, (n, n_heads)."""
    read = read_directions(dictionary, block)  # (n, width)
    if dictionary.basis is Basis.HEADS:
        through = read.view(len(read), attention.n_heads, -1)  # (n, n_heads, head_dim)
    else:
        through = torch.einsum("nd,hde->nhe", attention.post.transposed(read), computed(attention.W_O))
    return _lengths(through, _rows(attention.norm, attention.W_V))


def _reading(attention: AttentionWeights, role: Role, written: Tensor) -> Tensor:
    """|P W_O W_V N w|, |Nᵀ W_Kᵀ W_Q N w| or |Nᵀ W_Qᵀ W_K N w| of each feature and head; written (n, d_model) → (n, n_heads)."""
    first = {Role.VALUE: attention.W_V, Role.QUERY: attention.W_Q, Role.KEY: attention.W_K}[role]
    second = {
        Role.VALUE: lambda: attention.post(computed(attention.W_O).transpose(1, 2)),
        Role.QUERY: lambda: _rows(attention.norm, attention.W_K),
        Role.KEY: lambda: _rows(attention.norm, attention.W_Q),
    }[role]()  # (n_heads, head_dim, d_model)
    return _lengths(torch.einsum("nd,hed->nhe", attention.norm(written), computed(first)), second)


def _rows(norm: LinearNorm, weight: Tensor) -> Tensor:
    """The rows of W N, (n_heads, head_dim, d_model)."""
    return norm.transposed(computed(weight))


def _lengths(through: Tensor, rows: Tensor) -> Tensor:
    """|rowsᵀ z| by the rows' products with each other; through z (n, n_heads, head_dim), rows (n_heads, head_dim, d) → (n, n_heads)."""
    products = rows @ rows.transpose(1, 2)  # (n_heads, head_dim, head_dim)
    return (torch.einsum("nhe,hef->nhf", through, products) * through).sum(-1).clamp_min(0).sqrt()


def _frame(strengths: Tensor, first: int, layer: int, role: Role) -> pl.DataFrame:
    total = strengths.sum(dim=1, keepdim=True)  # (n, 1)
    touched = (total[:, 0] > 0).nonzero().flatten()
    shares = (strengths[touched] / total[touched]).float().cpu().numpy()  # (touched, n_heads)
    n_heads = shares.shape[1]
    return pl.DataFrame(
        {
            "feature": np.repeat(touched.cpu().numpy() + first, n_heads).astype(np.int32),
            "layer": np.full(shares.size, layer, dtype=np.int32),
            "head": np.tile(np.arange(n_heads, dtype=np.int32), len(shares)),
            "role": pl.repeat(role.value, shares.size, dtype=pl.String, eager=True),
            "share": shares.ravel(),
        }
    )
