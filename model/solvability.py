"""Whether a model solves a task: answer against wrong answer, on the clean and on the corrupt prompt."""

from collections.abc import Sequence
from typing import Any

import polars as pl
import torch
from torch import Tensor

from .loading import LoadedModel
from .metrics import Metric, evaluate
from .pairs import NoPairs, Pair, PairBatch, batches

CHECK_SCHEMA = {
    "task": pl.String,
    "label": pl.String,
    "n": pl.Int64,
    "accuracy": pl.Float64,
    "logit_diff": pl.Float64,
    "corrupt_logit_diff": pl.Float64,
    "flipped": pl.Float64,
    "first": pl.Float64,
}


def check_task(model: LoadedModel, pairs: Sequence[Pair], *, batch_size: int = 32) -> pl.DataFrame:
    """One row a task (`label` null) followed by one a label, tasks and labels in the order in which the pairs bring them.

    `accuracy` is the share of pairs whose answer has a greater logit than the wrong answer on the clean prompt, `logit_diff` and
    `corrupt_logit_diff` are means of answer minus wrong answer, `flipped` is the share that is positive on the clean prompt and
    negative on the corrupt one, `first` the share whose answer is the likeliest of the whole vocabulary. Schema: `CHECK_SCHEMA`.
    """
    if not pairs:
        raise NoPairs("there are no pairs to check the model on")
    measured = pl.concat([_measure(model, batch) for batch in batches(pairs, model.tokenizer, batch_size=batch_size)])
    position = {pair.key: i for i, pair in enumerate(pairs)}
    measured = measured.sort(pl.col("key").replace_strict(position, return_dtype=pl.Int64))
    figures = (
        pl.len().cast(pl.Int64).alias("n"),
        (pl.col("clean") > 0).mean().alias("accuracy"),
        pl.col("clean").mean().alias("logit_diff"),
        pl.col("corrupt").mean().alias("corrupt_logit_diff"),
        ((pl.col("clean") > 0) & (pl.col("corrupt") < 0)).mean().alias("flipped"),
        pl.col("first").mean().alias("first"),
    )
    rows = []
    for (task,), group in measured.group_by("task", maintain_order=True):
        by_label = group.drop_nulls("label").group_by("label", maintain_order=True).agg(*figures)
        whole = group.select(*figures).with_columns(pl.lit(None, pl.String).alias("label"))
        rows += [frame.with_columns(pl.lit(task).alias("task")).select(list(CHECK_SCHEMA)) for frame in (whole, by_label)]
    return pl.concat(rows).cast(CHECK_SCHEMA)  # type: ignore[arg-type]


def _measure(model: LoadedModel, batch: PairBatch) -> pl.DataFrame:
    """One row a pair: key, task, label, the logit differences and whether the answer comes first."""
    on = batch.to(model.device)
    clean, corrupt = _last_logits(model.module, on.clean), _last_logits(model.module, on.corrupt)  # (batch, vocab)
    difference = lambda logits: evaluate(Metric.LOGIT_DIFF, logits, on.answer, on.wrong_answer).double().tolist()
    return pl.DataFrame(
        {
            "key": [pair.key for pair in batch.pairs],
            "task": [pair.task for pair in batch.pairs],
            "label": pl.Series([pair.label for pair in batch.pairs], dtype=pl.String),
            "clean": difference(clean),
            "corrupt": difference(corrupt),
            "first": evaluate(Metric.ACCURACY, clean, on.answer, on.wrong_answer).double().tolist(),
        }
    )


@torch.no_grad()
def _last_logits(module: Any, tokens: Tensor) -> Tensor:
    """The logits at the last position, (batch, vocab)."""
    return module(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[:, -1]
