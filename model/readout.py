"""What single targets keep of a site's values, read as directly as the dictionary allows.

A site's value is often an affine function of something computed on the way, its hidden value: an MLP's inner activations, the heads of
an attention. A feature's raw value is then one dot product with its encoder column pulled through that function, and the site's value
itself is made only where a whole row is needed:

1. Kinds whose mask is local (ReLU, JumpReLU, gated) need nothing else.
2. TopK: the k-th largest raw value of *any* features bounds that of all from below. Features active in the clean or the baseline run
   of a position give a tight bound: a target below it is 0. Only where one is at or above it the whole row is encoded.
3. Dictionaries that normalise their input, and error nodes, take the value.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .dictionaries import Dictionary, TopKDictionary, sparse_affine
from .products import linear

_MARGIN = 1e-3
"""Of the largest raw value: what lies so much below the bound is taken for below it. Rounding is far smaller."""


@dataclass(frozen=True, eq=False)
class Output:
    """A site's value from its hidden one, hidden · weightᵀ + bias. weight: (d_in, d_hidden); bias: (d_in,) or None."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.weight, self.bias)


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads a site's nodes off hidden values.

    output: how the value is made of a hidden one; None where they are the same. columns (T,): features that are asked for, ascending.
    known (cells, d_sae): which features are likely to be among the largest at a cell; for TopK only. pull: whether encoder columns are pulled
    through `output` (worth while for more rows than columns).
    """

    dictionary: Dictionary
    output: Output | None
    columns: Tensor
    known: Tensor | None
    pull: bool

    def values(self, hidden: Tensor) -> Tensor:
        """The site's values of hidden ones, (n, d_hidden) → (n, d_in)."""
        return hidden if self.output is None else self.output(hidden)

    @cached_property
    def _all(self) -> Tensor:
        """The features whose encoder columns are at hand: those asked for, and the known ones."""
        return self.columns if self.known is None else torch.cat([self.columns, self.known.any(dim=0).nonzero().flatten()]).unique()

    @cached_property
    def _place(self) -> Tensor:
        """Where a feature is among them, (d_sae,)."""
        place = torch.full((self.dictionary.d_sae,), -1, device=self._all.device)
        place[self._all] = torch.arange(len(self._all), device=place.device)
        return place

    @cached_property
    def _pulled(self) -> tuple[Tensor, Tensor] | None:
        """Raw values as affine functions of the hidden value: (n, d_hidden) and (n,); None where they are not."""
        affine = sparse_affine(self.dictionary, self._all)
        if affine is None or self.output is None:
            return affine
        weight, offset = affine
        bias = offset if self.output.bias is None else offset + weight @ self.output.bias
        return linear(weight, self.output.weight.T), bias

    def nodes(self, hidden: Tensor, row: Tensor, node: Tensor, cell: Tensor) -> Tensor:
        """Value i is that of feature node[i] at row row[i] of `hidden` (rows, d_hidden), whose cells are `cell` (rows,) → (n,)."""
        if not len(node):
            return hidden.new_zeros(0)
        if (self.output is not None and not self.pull) or self._pulled is None:
            rows, inverse = row.unique(return_inverse=True)
            values = self.values(hidden[rows])
            return self._screened(values, inverse, node, cell[rows], None) if self._screens else self.dictionary.encode_at(values, inverse, node)
        if self._screens:
            return self._screened(hidden, row, node, cell, self.output)
        return self.activated(self._raw(hidden, row, node), node)

    def activated(self, raw: Tensor, node: Tensor) -> Tensor:
        """Nodes of raw values; raw and node (n, ...) of kinds whose mask is local."""
        values, mask = self.dictionary.activate(raw, node)  # type: ignore[attr-defined]
        return torch.where(mask, values, 0.0)

    @property
    def _screens(self) -> bool:
        plain = sparse_affine(self.dictionary, self.columns[:0]) is not None
        return isinstance(self.dictionary, TopKDictionary) and self.known is not None and plain

    def _weights(self, output: Output | None) -> tuple[Tensor, Tensor]:
        """Raw values' weights on what `output` is applied to."""
        found = self._pulled if output is not None or self.output is None else sparse_affine(self.dictionary, self._all)
        assert found is not None
        return found

    def _raw(self, hidden: Tensor, row: Tensor, node: Tensor) -> Tensor:
        """Raw values of single pairs, (n,)."""
        return self._pairs(hidden, row, node, *self._weights(self.output))

    def _pairs(self, x: Tensor, row: Tensor, node: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
        place = self._place[node]
        columns, inverse = place.unique(return_inverse=True)
        if len(x) * len(columns) <= 8 * len(node):  # most pairs are asked for: one product
            return linear(x, weight[columns], offset[columns])[row, inverse]
        return torch.linalg.vecdot(x[row], weight[place]) + offset[place]

    def _screened(self, x: Tensor, row: Tensor, node: Tensor, cell: Tensor, output: Output | None) -> Tensor:
        """TopK nodes; `x` (rows, width) are hidden values, or the site's values where `output` is None."""
        dictionary, known = self.dictionary, self.known
        assert isinstance(dictionary, TopKDictionary)
        assert known is not None  # it screens only then
        weight, offset = self._weights(output)
        b_enc = dictionary.b_enc.to(offset)
        values = self._pairs(x, row, node, weight, offset) + b_enc[node]
        nodes = torch.zeros_like(values)
        left = (values > 0).nonzero().flatten()
        if not len(left):
            return nodes
        rows, inverse = row[left].unique(return_inverse=True)
        likely = known[cell[rows]].any(dim=0).nonzero().flatten()
        if len(likely) >= dictionary.k:
            at = self._place[likely]
            raw = linear(x[rows], weight[at], offset[at] + b_enc[likely])  # (rows, likely)
            bound = raw.topk(dictionary.k, dim=-1, sorted=False).values.amin(dim=-1) - _MARGIN * raw.abs().amax(dim=-1)
            left = left[values[left] >= bound[inverse]]
        if len(left):
            rows, inverse = row[left].unique(return_inverse=True)
            whole = x[rows] if output is None else output(x[rows])
            nodes[left] = dictionary.encode_at(whole, inverse, node[left])
        return nodes
