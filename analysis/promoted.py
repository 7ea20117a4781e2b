"""What a feature does to the next token when nothing but the unembedding reads it: the logit lens of its decoder direction.

1. A feature's direction in the residual stream: its decoder's row, through the heads' output projection where its site is of head outputs.
2. The linear part of the final norm (its gain, and its centring where it has one), then the unembedding. The norm's scale, one number per
   position, is left out: it changes no order.
3. Each row is centred over the vocabulary, which changes no probability, and divided by its standard deviation: z says how far a token stands out.
   The largest of V independent normal values is about √(2 ln V); what does not reach beyond that stands out by chance.

nostalgebraist (2020), interpreting GPT: the logit lens.
"""

import math
from collections.abc import Iterator, Mapping

import polars as pl
import torch
from torch import Tensor

from ..model.binding import Binding
from ..model.dictionaries import Dictionary
from ..model.loading import LoadedModel
from ..model.sites import Site
from ..model.weights import ModelWeights, computed, linear_norm, matrix, write_directions

PROMOTED: Mapping[str, pl.DataType] = {
    "site": pl.String(), "feature": pl.Int64(), "promotes": pl.Boolean(), "rank": pl.Int64(), "token": pl.String(), "logit": pl.Float64(),
    "z": pl.Float64(),
}  # fmt: skip
"""The tokens that a feature promotes (and those that it suppresses), strongest first. `logit`: per unit of the feature at a norm's scale of 1."""

ENTRIES = 2**25
"""Logits that are held at once."""


def chance_z(n_tokens: int) -> float:
    """How far the largest of `n_tokens` independent normal values lies from their mean, about: √(2 ln n)."""
    return math.sqrt(2.0 * math.log(max(n_tokens, 2)))


@torch.no_grad()
def direct_logits(weights: ModelWeights, dictionary: Dictionary, site: Site, features: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """What one unit of each feature adds to the logits at a final norm's scale of 1: (features (n,), logits (n, vocab)), some at a time."""
    binding = weights.binding
    norm = linear_norm(binding.final_norm, binding.d_model, binding.device)
    unembedding, _ = matrix(binding.unembedding, binding.device)  # (vocab, d_model)
    step = max(1, ENTRIES // len(unembedding))
    for part in features.split(step):
        written = _written(dictionary, site, weights, part)  # (n, d_model)
        yield part, norm(written) @ computed(unembedding).T.to(written.dtype)  # (n, vocab)


def _written(dictionary: Dictionary, site: Site, weights: ModelWeights, features: Tensor) -> Tensor:
    """The features' directions in the residual stream, (n, d_model)."""
    low, high = int(features.min()), int(features.max()) + 1
    return write_directions(dictionary, site, weights.attention, slice(low, high))[features - low]


@torch.no_grad()
def promoted_tokens(
    model: LoadedModel, dictionaries: Mapping[Site, Dictionary], features: Mapping[str, list[int]], *, n: int = 5
) -> pl.DataFrame:
    """The `n` tokens that each feature promotes most and suppresses most, as `PROMOTED`, by site, feature and rank.

    features: site's name → features. Tokens that the tokenizer does not have (a padded vocabulary) are left out.
    """
    weights = ModelWeights(Binding(model.module))
    n_tokens = min(len(model.tokenizer), len(matrix(weights.binding.unembedding)[0]))
    n = min(n, n_tokens)
    frames = []
    for site, dictionary in dictionaries.items():
        chosen = features.get(site.name)
        if not chosen:
            continue
        index = torch.tensor(sorted(chosen), device=dictionary.home)
        for part, logits in direct_logits(weights, dictionary, site, index):
            frames.append(_strongest(site.name, part, logits[:, :n_tokens], n))
    if not frames:
        return pl.DataFrame(schema=PROMOTED)
    rows = pl.concat(frames)
    ids = rows["id"].unique().sort()
    texts = model.tokenizer.batch_decode([[i] for i in ids.to_list()], clean_up_tokenization_spaces=False)
    known = pl.DataFrame({"id": ids, "token": pl.Series(texts, dtype=pl.String)})
    return rows.join(known, on="id", how="left", maintain_order="left").select(pl.col(name).cast(dtype) for name, dtype in PROMOTED.items())


def _strongest(site: str, features: Tensor, logits: Tensor, n: int) -> pl.DataFrame:
    """The n largest and the n smallest of each row, with their z: `site, feature, promotes, rank, id, logit, z`."""
    centred = logits - logits.mean(dim=1, keepdim=True)
    spread = (centred.norm(dim=1, keepdim=True) / math.sqrt(centred.shape[1])).clamp_min(torch.finfo(centred.dtype).tiny)
    frames = []
    for promotes in (True, False):
        found = centred.topk(n, dim=1, largest=promotes)
        shape = (len(features), n)
        frames.append(
            pl.DataFrame(
                {
                    "feature": features[:, None].expand(shape).flatten().cpu().numpy(), "rank": torch.arange(n).expand(shape).flatten().numpy(),
                    "id": found.indices.flatten().cpu().numpy(), "logit": found.values.flatten().double().cpu().numpy(),
                    "z": (found.values / spread).flatten().double().cpu().numpy(),
                }
            ).with_columns(site=pl.lit(site), promotes=pl.lit(promotes))
        )  # fmt: skip
    return pl.concat(frames).sort("feature", pl.col("promotes").not_(), "rank")
