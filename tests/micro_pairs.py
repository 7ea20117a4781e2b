"""Small batches of clean and corrupted token sequences for the tiny models."""

import torch
from featlas.model.tasks import Pair, PairBatch

from .micro import VOCAB


def tiny_pairs(batch: int = 2, length: int = 6, *, seed: int = 5, identical: bool = False, only: int | None = None) -> PairBatch:
    """`batch` pairs of `length` random tokens; pair i differs from token 1 + i on in one or two tokens."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(0, VOCAB, (batch, length), generator=generator)
    corrupt = clean.clone()
    if not identical:
        for i in range(batch):
            corrupt[i, 1 + i] = (corrupt[i, 1 + i] + 7) % VOCAB
        corrupt[0, length - 2] = (corrupt[0, length - 2] + 3) % VOCAB
    answer, wrong = torch.arange(batch) + 2, torch.arange(batch) + 20
    pairs = tuple(Pair(clean=f"c{i}", corrupt=f"d{i}", answer=f"a{i}", wrong_answer=f"b{i}", task="tiny") for i in range(batch))
    if only is not None:
        one = slice(only, only + 1)
        return PairBatch(pairs=pairs[one], clean=clean[one], corrupt=corrupt[one], answer=answer[one], wrong_answer=wrong[one])
    return PairBatch(pairs=pairs, clean=clean, corrupt=corrupt, answer=answer, wrong_answer=wrong)
