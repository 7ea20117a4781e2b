"""Automatic labels, rule by rule: what the numbers say of a feature, as a short label and a sentence with the numbers.

Every rule gives rows `RULED`: a short label, the evidence in words, and a confidence from 0 to 1. Nothing is drawn at random, ties go by text.

1. `tokens`: the tokens at which it is active, by their share of its activation. confidence = that share · n / (n + 2), n being how often it fires.
2. `class`: the class of those tokens (numbers, punctuation, capitalised words, pronouns, …), or their place in the text, where at least half of its
   activation is there and chance does not explain it: confidence = (share − s₀) / (1 − s₀) · n / (n + 2), s₀ the class' share of all tokens. Of
   several such classes the most telling, by share · ln(share / s₀).
3. `decoder`: the tokens that its direction promotes, by the logit lens. confidence = z / √(2 ln V) − 1, clipped: 0 where the first token stands out
   no more than the largest of V random values, 1 at twice that.
4. `task`: the task that it serves, by its share of what is sent in each sequence of all runs. confidence = (share − 1/T) / (1 − 1/T) · n / (n + 2)
   over T tasks, n being the sequences of any task in which it sends something.
5. `place`: where it stands in the circuit: how deep, what it reads, which features it drives. confidence = the greatest of the shares named.
6. `region`: the region of interest that it belongs to, or the community. confidence = the region's mean correlation; null for communities.

1 and 2 take a run of samples (all activations at all tokens of a text), where there is one, else the strongest contexts of a statistics run; these
also where the samples' tokens are not sure.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import polars as pl
from scipy import sparse  # type: ignore[import-untyped]

from ..queries.samples import SiteSamples
from .notes import SEPARATOR
from .promoted import chance_z


class Rule(StrEnum):
    """The rules, as they are named where labels are kept."""

    TOKENS = "tokens"
    CLASS = "class"
    DECODER = "decoder"
    TASK = "task"
    PLACE = "place"
    REGION = "region"


RULED: Mapping[str, pl.DataType] = {
    "key": pl.String(), "rule": pl.String(), "label": pl.String(), "evidence": pl.String(), "confidence": pl.Float64(), "source": pl.String(),
}  # fmt: skip

DIGITS = 10
"""Shares are rounded to so many, so that sums taken in another order neither differ nor change the order of ties."""

N_TOKENS = 3
LEAST_SHARE = 0.1  # of a token that is named beside the first
CLASS_SHARE = 0.5
HUB = 0.99  # a hub has more edges than this share of the nodes, and at least
HUB_EDGES = 10
_WIDTH = 24  # characters of a token in a label

_WORDS = {
    "articles and determiners": "the a an this that these those each every some any no all both",
    "pronouns": "i you he she it we they me him her us them my your his its our their mine yours hers ours theirs himself herself itself themselves",
    "relative words": "who whom whose which that where when why",
    "forms of be, have and do": "am is are was were be been being 's 're has have had having do does did",
    "modal verbs": "can could may might must shall should will would",
    "prepositions": "of in on at by for with about against between into through during before after above below to from up down over under near",
    "conjunctions": "and or but so because if while although though since unless",
    "negations": "not no never n't nothing nobody none neither nor cannot",
}
_PATTERNS = {
    "numbers": r"^\p{N}+([.,:/]\p{N}+)*$", "punctuation and symbols": r"^[\p{P}\p{S}]+$", "line breaks": r"^\s*\n\s*$", "blanks": r"^[ \t]+$",
    "capital letters": r"^\p{Lu}{2,}$", "capitalised words": r"^\p{Lu}[\p{Ll}\p{M}]+$", "Chinese characters": r"^\p{Han}+$",
    "Cyrillic letters": r"^\p{Cyrillic}+$", "Arabic letters": r"^\p{Arabic}+$", "Greek letters": r"^\p{Greek}+$", "Hebrew letters": r"^\p{Hebrew}+$",
    "Japanese syllables": r"^[\p{Hiragana}\p{Katakana}]+$", "Devanagari letters": r"^[\p{Devanagari}]+$", "Korean syllables": r"^\p{Hangul}+$",
}  # fmt: skip
START, END, INSIDE = "the first token", "the last token", "continuations of words"
CLASSES = (*_PATTERNS, *_WORDS, START, END, INSIDE)
_PLACES = {START: "at the start of the text", END: "at the end of the text"}


@dataclass(frozen=True)
class Occurrences:
    """Tokens, and how strongly features are active at each.

    tokens: `text, first, last, inside`, one row a token. values: (n_tokens, n_features) ≥ 0, sparse. keys: of the features. of: what the shares are
    of, in words. source: the run that they come from. whole: all of the features' activation is there, not only the strongest places.
    """

    tokens: pl.DataFrame
    values: sparse.csr_matrix
    keys: list[str]
    of: str
    source: str
    whole: bool

    def active_keys(self) -> list[str]:
        """Those of the features that are active anywhere."""
        return [self.keys[i] for i in np.flatnonzero(np.asarray((self.values > 0).sum(axis=0)).ravel())]


def empty() -> pl.DataFrame:
    """No label at all."""
    return pl.DataFrame(schema=RULED)


def _ruled(rows: pl.DataFrame, rule: Rule, source: str | pl.Expr) -> pl.DataFrame:
    """Rows with `key, label, evidence, confidence` as `RULED`, by key."""
    value = pl.lit(source) if isinstance(source, str) else source
    known = rows.with_columns(pl.col("confidence").round(DIGITS), rule=pl.lit(str(rule)), source=value)
    return known.select(pl.col(name).cast(dtype) for name, dtype in RULED.items()).sort("key")


def percent(share: pl.Expr) -> pl.Expr:
    """A share in whole per cent; what is not 0 is at least “< 1 %”."""
    rounded = (100 * share).round().cast(pl.Int64).cast(pl.String)
    return pl.when((share > 0) & (share < 0.005)).then(pl.lit("< 1 %")).otherwise(rounded + pl.lit(" %"))


# what no label holds (`queries.labels.checked`), as the pictures that Unicode has of them
_CONTROLS = {chr(code): chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {"\x7f": "␡"}


def shown(token: pl.Expr) -> pl.Expr:
    """A token as names show it: without the blanks around it, line breaks visible."""
    visible = token.str.strip_chars(" ").replace({"": "␣"}).str.replace_all("\n", "⏎", literal=True).str.replace_all("\t", "⇥", literal=True)
    visible = visible.str.replace_many(list(_CONTROLS), list(_CONTROLS.values()))
    return pl.when(visible.str.len_chars() > _WIDTH).then(visible.str.head(_WIDTH - 1) + "…").otherwise(visible)


def quoted(token: pl.Expr) -> pl.Expr:
    """A token as evidence shows it: between quotes, its blanks kept, line breaks visible."""
    visible = token.str.replace_all("\n", "⏎", literal=True).str.replace_all("\t", "⇥", literal=True)
    visible = visible.str.replace_many(list(_CONTROLS), list(_CONTROLS.values()))
    cut = pl.when(visible.str.len_chars() > _WIDTH).then(visible.str.head(_WIDTH - 1) + "…").otherwise(visible)
    return pl.concat_str(pl.lit("‘"), cut, pl.lit("’"))


# -- 1, 2. what it fires on ----------------------------------------------------------------------------------


def sampled(samples: SiteSamples, tokens: pl.DataFrame, features: np.ndarray, keys: list[str], source: str) -> Occurrences:
    """The occurrences of features (n,) in a run of samples of activations; `tokens` as `SampleStore.tokens` gives them."""
    place = tokens.with_row_index("row").sort("sequence", "position")
    same = pl.col("sequence") == pl.col("sequence").shift(1)
    follows = same & (pl.col("position") == pl.col("position").shift(1) + 1)
    told = place.select(
        "row", pl.col("text").fill_null(""), first=~same.fill_null(False), last=(pl.col("sequence") != pl.col("sequence").shift(-1)).fill_null(True),
        inside=(follows & _continues(pl.col("text").shift(1), pl.col("text"))).fill_null(False),
    ).sort("row").drop("row")  # fmt: skip
    values = sparse.csr_matrix(samples.values).tocsc()[:, features]
    return Occurrences(told, abs(values).tocsr(), keys, f"of its activation over {len(told):,} tokens", source, True)


def _continues(before: pl.Expr, token: pl.Expr) -> pl.Expr:
    return before.str.contains(r"[\p{L}\p{N}]$") & token.str.contains(r"^[\p{L}\p{N}]")


def from_contexts(contexts: pl.DataFrame, source: str) -> Occurrences:
    """The occurrences of features in their strongest contexts (`notes.CONTEXTS`)."""
    keys = contexts["key"].unique().sort()
    column = contexts.select(pl.col("key").replace_strict(keys, pl.int_range(len(keys), eager=True), return_dtype=pl.Int64))["key"].to_numpy()
    tokens = contexts.select(
        text="token", first=pl.col("before").list.len() == 0, last=pl.col("after").list.len() == 0,
        inside=_continues(pl.col("before").list.last().fill_null(""), pl.col("token")),
    )  # fmt: skip
    shape = (len(contexts), len(keys))
    values = sparse.csr_matrix((contexts["value"].abs().to_numpy(), (np.arange(len(contexts)), column)), shape=shape)
    return Occurrences(tokens, values, keys.to_list(), "of its strongest contexts", source, False)


def token_shares(found: Occurrences) -> pl.DataFrame:
    """Where features are active, by token: `key, token, share, n` (how often it is active there), `n_token` (how often the token occurs),
    `n_active`; by key, greatest share first."""
    types = found.tokens["text"].unique().sort()
    code = found.tokens.select(pl.col("text").replace_strict(types, pl.int_range(len(types), eager=True), return_dtype=pl.Int64))["text"].to_numpy()
    entries = found.values.tocoo()
    active = entries.data > 0
    rows = pl.DataFrame({"feature": entries.col[active], "code": code[entries.row[active]], "value": entries.data[active].astype(np.float64)})
    counts = pl.DataFrame({"code": code}).group_by("code").len("n_token")
    by_token = rows.group_by("feature", "code").agg(pl.col("value").sum(), pl.len().alias("n")).join(counts, on="code")
    share = (pl.col("value") / pl.col("value").sum().over("feature")).round(DIGITS)
    whole = by_token.with_columns(share=share, n_active=pl.col("n").sum().over("feature"))
    named = whole.with_columns(key=pl.Series(found.keys, dtype=pl.String).gather(whole["feature"]), token=types.gather(whole["code"]))
    return named.sort(["key", "share", "token"], descending=[False, True, False]).select("key", "token", "share", "n", "n_token", "n_active")


def tokens_rule(found: Occurrences) -> pl.DataFrame:
    """The tokens at which features are active, as `RULED`."""
    if not found.values.nnz:
        return empty()
    by_token = token_shares(found).with_columns(rank=pl.int_range(pl.len()).over("key"))
    # the strongest contexts are many tokens' as a rule: none of them has much, and they say what it is together
    enough = (pl.col("rank") == 0) | (pl.col("share") >= LEAST_SHARE) if found.whole else pl.lit(True)
    top = by_token.filter((pl.col("rank") < N_TOKENS) & enough)
    number = lambda name: pl.col(name).cast(pl.String)
    often = pl.concat_str(pl.lit(", at "), number("n"), pl.lit(" of its "), number("n_token"), pl.lit(" occurrences")) if found.whole else pl.lit("")
    of = pl.when(pl.col("rank") == 0).then(pl.lit(f" {found.of}")).otherwise(pl.lit(""))
    said = pl.concat_str(quoted(pl.col("token")), pl.lit(" ("), percent(pl.col("share")), of, often, pl.lit(")"))
    rows = top.with_columns(said=said, shown=shown(pl.col("token"))).group_by("key", maintain_order=True).agg(
        label=pl.col("shown").unique(maintain_order=True).str.join(SEPARATOR),
        evidence=pl.concat_str(pl.lit("fires on "), pl.col("said").str.join(", ")),
        confidence=pl.col("share").sum().clip(0, 1) * (pl.col("n_active") / (pl.col("n_active") + 2)).first(),
    )  # fmt: skip
    return _ruled(rows, Rule.TOKENS, found.source)


def classes_of(tokens: pl.DataFrame) -> np.ndarray:
    """Which of `CLASSES` each token (`text, first, last, inside`) belongs to: (n_tokens, n_classes), 0 or 1."""
    types = tokens.select("text").unique().sort("text")
    by_type = types.with_columns(bare=pl.col("text").str.strip_chars(" ")).with_columns(
        *(pl.col("text" if name in ("line breaks", "blanks") else "bare").str.contains(pattern).alias(name) for name, pattern in _PATTERNS.items()),
        *(pl.col("bare").str.to_lowercase().is_in(words.split()).alias(name) for name, words in _WORDS.items()),
    )
    # Without any token that brings its own blank, a tokenizer does not say where words begin.
    says = tokens.select(pl.col("text").str.starts_with(" ").mean())["text"][0]
    place = tokens.select(pl.col("first").alias(START), pl.col("last").alias(END), (pl.col("inside") & pl.lit((says or 0) > 0.05)).alias(INSIDE))
    known = pl.concat([tokens.select("text"), place], how="horizontal").join(by_type, on="text", how="left", maintain_order="left")
    return known.select(CLASSES).to_numpy().astype(np.float64)


def class_rule(found: Occurrences) -> pl.DataFrame:
    """The class of the tokens, or their place, where most of a feature's activation is there and chance does not explain it, as `RULED`."""
    if not found.values.nnz:
        return empty()
    member = classes_of(found.tokens)  # (n_tokens, n_classes)
    total = np.asarray(found.values.sum(axis=0), dtype=np.float64).ravel()  # (n_features,)
    share = np.asarray(found.values.T @ member, dtype=np.float64) / np.maximum(total, 1e-300)[:, None]  # (n_features, n_classes)
    n = np.diff(found.values.tocsc().indptr)  # how often each is active
    base = member.mean(axis=0) if found.whole else np.asarray(found.values.sum(axis=1)).ravel() @ member / max(total.sum(), 1e-300)
    beyond = (share - base) / np.maximum(1 - base, 1e-9) * (n / (n + 2))[:, None]
    telling = share * np.log(np.maximum(share, 1e-9) / np.maximum(base, 1e-9))
    telling[(share < CLASS_SHARE) | (share < 1.5 * base) | (beyond <= 0)] = -1.0
    best = telling.argmax(axis=1)
    chosen = np.flatnonzero(telling[np.arange(len(best)), best] > 0)
    name = [CLASSES[i] for i in best[chosen]]
    rows = pl.DataFrame(
        {
            "key": pl.Series([found.keys[i] for i in chosen], dtype=pl.String), "class": pl.Series(name, dtype=pl.String),
            "share": share[chosen, best[chosen]], "base": base[best[chosen]], "confidence": beyond[chosen, best[chosen]], "n": n[chosen],
        }
    )  # fmt: skip
    place = pl.col("class").is_in(list(_PLACES))
    said = pl.when(place).then(pl.col("class").replace(_PLACES)).otherwise(pl.concat_str(pl.lit("on "), pl.col("class")))
    evidence = pl.concat_str(
        pl.lit("fires "), said, pl.lit(" ("), percent(pl.col("share")), pl.lit(f" {found.of}; "), percent(pl.col("base")),
        pl.lit(" of all tokens are)" if found.whole else " over all features)"),
    )  # fmt: skip
    return _ruled(rows.with_columns(label=pl.col("class").replace(_PLACES), evidence=evidence), Rule.CLASS, found.source)


# -- 3. what its decoder does --------------------------------------------------------------------------------


def decoder_rule(promoted: pl.DataFrame, keys: pl.DataFrame, n_vocabulary: int, source: str) -> pl.DataFrame:
    """The tokens that features promote and suppress (`promoted.PROMOTED`), as `RULED`; `keys`: `site, feature, key`."""
    known = promoted.join(keys, on=["site", "feature"]).filter(pl.col("rank") < N_TOKENS)
    rows = known.sort("key", "promotes", "rank", descending=[False, True, False])
    signed = pl.concat_str(pl.when(pl.col("z") > 0).then(pl.lit("+")).otherwise(pl.lit("−")), pl.col("z").abs().round(1).cast(pl.String))
    rows = rows.with_columns(said=pl.concat_str(quoted(pl.col("token")), pl.lit(" "), signed), shown=shown(pl.col("token")))
    by_key = rows.group_by("key", maintain_order=True).agg(
        label=pl.col("shown").filter("promotes").unique(maintain_order=True).str.join(", "), up=pl.col("said").filter("promotes").str.join(", "),
        down=pl.col("said").filter(~pl.col("promotes")).str.join(", "), z=pl.col("z").filter("promotes").max(),
    )  # fmt: skip
    chance = chance_z(n_vocabulary)
    evidence = pl.concat_str(
        pl.lit("its decoder promotes "), "up", pl.lit("; suppresses "), "down",
        pl.lit(f" (standard deviations of its logits; the largest of so many random ones is about {chance:.1f})"),
    )  # fmt: skip
    return _ruled(
        by_key.with_columns(label=pl.lit("→ ") + pl.col("label"), evidence=evidence, confidence=(pl.col("z") / chance - 1).clip(0, 1)),
        Rule.DECODER, source,
    )  # fmt: skip


# -- 4. the task it serves -----------------------------------------------------------------------------------


def task_shares(sent: pl.DataFrame, tasks: pl.DataFrame) -> pl.DataFrame:
    """How a feature's part in what is sent falls to tasks: `key, task, share, n` (the task's sequences where it sends anything), `n_task` (all of
    them), `n_sent` (those of all tasks); greatest share first.

    sent: `run, key, task, sequence, sent`. tasks: `run, task, n` (all sequences of each). What a feature sends counts as its part of all that is sent
    in its sequence; its mean over a task's sequences, those where it sends nothing too, is compared between tasks, so that tasks count alike.
    """
    part = sent.with_columns(part=pl.col("sent") / pl.col("sent").sum().over("run", "sequence"))
    sums = part.group_by("key", "task").agg(pl.col("part").sum(), pl.len().alias("n"))
    mean = sums.join(tasks.group_by("task").agg(pl.col("n").sum().alias("n_task")), on="task").with_columns(mean=pl.col("part") / pl.col("n_task"))
    shares = mean.with_columns(share=(pl.col("mean") / pl.col("mean").sum().over("key")).round(DIGITS), n_sent=pl.col("n").sum().over("key"))
    return shares.sort(["key", "share", "task"], descending=[False, True, False]).select("key", "task", "share", "n", "n_task", "n_sent")


def task_rule(sent: pl.DataFrame, tasks: pl.DataFrame) -> pl.DataFrame:
    """The task that features serve, as `RULED`; none where all sequences are of one task. For the frames see `task_shares`."""
    n_tasks = tasks["task"].n_unique()
    if n_tasks < 2 or sent.is_empty():
        return empty()
    best = task_shares(sent, tasks).filter(pl.col("share") > 0).unique("key", keep="first", maintain_order=True)
    number = lambda name: pl.col(name).cast(pl.String)
    evidence = pl.concat_str(
        pl.lit("serves "), "task", pl.lit(" ("), percent(pl.col("share")), pl.lit(f" of its part in the effects of {n_tasks} tasks; active in "),
        number("n"), pl.lit(" of "), number("n_task"), pl.lit(" sequences of it)"),
    )  # fmt: skip
    confidence = ((pl.col("share") - 1 / n_tasks) / (1 - 1 / n_tasks)).clip(0, 1) * (pl.col("n_sent") / (pl.col("n_sent") + 2))
    runs = ", ".join(tasks["run"].unique().sort())
    return _ruled(best.with_columns(label=pl.concat_str(pl.lit("for "), "task"), evidence=evidence, confidence=confidence), Rule.TASK, runs)


# -- 5. its place in the circuit -----------------------------------------------------------------------------


def place_rule(edges: pl.DataFrame, features: pl.DataFrame, n_layers: int, names: Mapping[str, str]) -> pl.DataFrame:
    """Where features stand, as `RULED`.

    edges: `run` and `places.DRIVES` of a model's runs; those of each run count as parts of its sum. features: `key, site, feature`. names: of
    features, by key, for what is driven.
    """
    if edges.is_empty():
        return empty()
    joined = edges.with_columns(part=pl.col("abs_weight") / pl.col("abs_weight").sum().over("run"))
    ends = ["source", "source_site", "source_kind", "target", "target_site", "target_kind"]
    pairs = joined.group_by(ends).agg(pl.col("part").sum())
    out = pairs.with_columns(share=(pl.col("part") / pl.col("part").sum().over("source")).round(DIGITS)).sort(
        ["source", "share", "target"], descending=[False, True, False]
    )  # fmt: skip
    inward = pairs.with_columns(share=(pl.col("part") / pl.col("part").sum().over("target")).round(DIGITS))
    number = dict(features.select("key", pl.col("feature").cast(pl.String)).iter_rows())
    whom = (
        pl.when(pl.col("target_kind") == "output").then(pl.lit("the output"))
        .otherwise(pl.concat_str("target_site", pl.lit("/"), pl.col("target").replace_strict(number, default="?", return_dtype=pl.String)))
    )  # fmt: skip
    called = pl.col("target").replace_strict(dict(names), default=None, return_dtype=pl.String)
    out = out.with_columns(whom=whom, called=pl.when(called.is_not_null()).then(pl.lit(" “") + called + pl.lit("”")).otherwise(pl.lit("")))
    said = pl.concat_str("whom", "called", pl.lit(" ("), percent(pl.col("share")), pl.lit(")"))
    named, into = pl.col("target_kind") != "error", lambda kind: pl.col("share").filter(pl.col("target_kind") == kind).sum()
    drives = out.group_by("source", maintain_order=True).agg(
        first=pl.concat_str("whom", pl.lit(" "), percent(pl.col("share"))).filter(named).first(), drives=said.filter(named).head(2).str.join(" and "),
        top=pl.col("share").filter(named).first(), n_out=pl.len(), to_output=into("output"), to_errors=into("error"),
    ).rename({"source": "key"})  # fmt: skip
    reads = inward.group_by("target").agg(
        n_in=pl.len(), from_errors=pl.col("share").filter(pl.col("source_kind") == "error").sum(),
        from_embed=pl.col("share").filter((pl.col("source_site") == "embed") & (pl.col("source_kind") == "feature")).sum(),
        mostly=pl.col("source_site").sort_by("share", "source_site", descending=[True, False]).first(),
    ).rename({"target": "key"})  # fmt: skip
    known = features.join(drives, on="key", how="left").join(reads, on="key", how="left")
    placed = _placed(known.filter(pl.col("n_out").is_not_null() | pl.col("n_in").is_not_null()), n_layers)
    return _ruled(placed, Rule.PLACE, ", ".join(edges["run"].unique().sort()))


def _placed(known: pl.DataFrame, n_layers: int) -> pl.DataFrame:
    """Labels, evidence and confidence of `place_rule` from its counts and shares."""
    layer = pl.col("site").str.extract(r"_(\d+)$").cast(pl.Int64).fill_null(-1)
    depth = (layer + 1) / n_layers
    known = known.with_columns(
        pl.col("n_in", "n_out").fill_null(0), pl.col("from_errors", "from_embed", "to_output", "to_errors", "top").fill_null(0.0),
        depth=pl.when(depth <= 1 / 3).then(pl.lit("early")).when(depth <= 2 / 3).then(pl.lit("middle")).otherwise(pl.lit("late")), layer=layer,
    ).with_columns(degree=pl.col("n_in") + pl.col("n_out"))  # fmt: skip
    most = known["degree"].quantile(HUB, "higher") or 0
    hub = (pl.col("degree") >= most) & (pl.col("degree") >= HUB_EDGES)
    number, nothing = lambda name: pl.col(name).cast(pl.String), pl.lit("")
    of = lambda name, words: pl.concat_str(pl.lit("; "), percent(pl.col(name)), pl.lit(words))
    told = lambda name, words: pl.when(pl.col(name) >= 0.01).then(of(name, words)).otherwise(nothing)
    driven = (
        pl.when(pl.col("n_out") == 0).then(pl.lit("; drives nothing that was kept"))
        .when(pl.col("top") > 0).then(pl.lit("; drives ") + pl.col("drives")).otherwise(nothing)
    )  # fmt: skip
    where = pl.when(pl.col("site") == "embed").then(pl.lit(", at the embedding: ")).otherwise(
        pl.concat_str(pl.lit(", layer "), number("layer"), pl.lit(f" of 0 to {n_layers - 1}: "))
    )  # fmt: skip
    evidence = pl.concat_str(
        "depth", where, pl.when(hub).then(pl.lit("a hub with ")).otherwise(nothing), number("degree"),
        pl.when(pl.col("degree") == 1).then(pl.lit(" edge")).otherwise(pl.lit(" edges")),
        told("from_embed", " of what it reads is the embedding"), told("from_errors", " of what it reads comes from error nodes"),
        driven, told("to_errors", " of its effect goes into error nodes"),
    )  # fmt: skip
    aim = pl.when(pl.col("n_out") == 0).then(pl.lit(", drives nothing")).otherwise(pl.lit(" → ") + pl.col("first").fill_null("error nodes"))
    label = pl.concat_str("depth", pl.when(hub).then(pl.lit(" hub")).otherwise(nothing), aim)
    confidence = pl.max_horizontal("top", "from_errors", "from_embed", "to_errors").clip(0, 1)
    return known.with_columns(label=label, evidence=evidence, confidence=confidence)


# -- 6. its region -------------------------------------------------------------------------------------------


def region_rule(blocks: pl.DataFrame, newest: list[str]) -> pl.DataFrame:
    """The region that features belong to, else the community, as `RULED`.

    blocks: `places.BLOCKS`. newest: parcellations, the one found last first.
    """
    if blocks.is_empty():
        return empty()
    age = pl.col("parcellation").replace_strict(dict(zip(newest, range(len(newest)))), default=len(newest), return_dtype=pl.Int64)
    known = blocks.with_columns(age=age, region=pl.col("kind") == "roi")
    best = known.sort(["key", "region", "age", "block"], descending=[False, True, False, False]).unique("key", keep="first", maintain_order=True)
    number = lambda name: pl.col(name).cast(pl.String)
    name = pl.when(pl.col("region")).then(pl.concat_str(pl.lit("region "), "site", pl.lit("/"), number("index"))).otherwise(
        pl.concat_str(pl.lit("community "), number("index"))
    )  # fmt: skip
    called = pl.when(pl.col("label").is_not_null()).then(pl.lit(" “") + pl.col("label") + pl.lit("”")).otherwise(pl.lit(""))
    together = pl.when(pl.col("mean_correlation").is_not_null()).then(
        pl.concat_str(pl.lit(", mean correlation inside "), pl.col("mean_correlation").round(2).cast(pl.String))
    ).otherwise(pl.lit(""))  # fmt: skip
    task = pl.when(pl.col("task").is_not_null()).then(
        pl.concat_str(pl.lit(", "), percent(pl.col("task_share")), pl.lit(" for "), "task")
    ).otherwise(pl.lit(""))  # fmt: skip
    inside = pl.concat_str(number("size"), pl.lit(" features"), together, task.fill_null(""))
    evidence = pl.concat_str(pl.lit("in "), name, called, pl.lit(" ("), inside, pl.lit(")"))
    rows = best.with_columns(label=pl.lit("in ") + name, evidence=evidence, confidence=pl.col("mean_correlation").clip(0, 1))
    return _ruled(rows, Rule.REGION, pl.col("parcellation"))


# -- together ------------------------------------------------------------------------------------------------

OF_CONTEXTS = "statistics "
"""So begins the source of what the strongest contexts of a statistics run say."""
SURE = 0.3
"""From this confidence on a rule's label is part of the summary."""
SUMMARY_WIDTH = 90


def summaries(parts: pl.DataFrame) -> pl.DataFrame:
    """One label for each feature from its labels by rule (`RULED`): `key, label, evidence, confidence, source`.

    First what it fires on: the tokens where they are sure, with their class where that is sure and of the same text; else a class that is surer than
    they are; without either its region or its place. Tokens of the strongest contexts give way to a sure class alone, and to no place in the text.
    Then, where they are sure, what its decoder promotes and the task that it serves. Confidence and evidence are those of the first part. A feature
    of which nothing but an unsure decoder is known gets none.
    """
    if parts.is_empty():
        return empty().drop("rule")
    of = lambda value: (pl.col(value).filter(pl.col("rule") == str(rule)).first().alias(f"{value}_{rule}") for rule in Rule)
    wide = parts.group_by("key").agg(*of("label"), *of("confidence"), *of("evidence"), *of("source")).sort("key")
    label, sure = lambda rule: pl.col(f"label_{rule}"), lambda rule: pl.col(f"confidence_{rule}").fill_null(0.0)
    same_text = pl.col(f"source_{Rule.TOKENS}") == pl.col(f"source_{Rule.CLASS}")
    both = (sure(Rule.CLASS) >= SURE) & (sure(Rule.TOKENS) >= SURE) & same_text
    in_contexts = pl.col(f"source_{Rule.TOKENS}").str.starts_with(OF_CONTEXTS).fill_null(False)
    says_more = ~in_contexts | ((sure(Rule.CLASS) >= SURE) & ~label(Rule.CLASS).is_in(list(_PLACES.values())).fill_null(False))
    by_class = (sure(Rule.CLASS) > sure(Rule.TOKENS)) & (sure(Rule.TOKENS) < SURE) & says_more
    firing = (
        pl.when(both).then(pl.concat_str(label(Rule.TOKENS), pl.lit(" ("), label(Rule.CLASS), pl.lit(")")))
        .when(by_class).then(label(Rule.CLASS))
        .otherwise(label(Rule.TOKENS))
    )  # fmt: skip
    sure_decoder = pl.when(sure(Rule.DECODER) >= SURE).then(label(Rule.DECODER))
    first = pl.coalesce(firing, label(Rule.REGION), label(Rule.PLACE), sure_decoder, label(Rule.TASK))
    decoder = pl.when(sure_decoder.is_not_null() & (first != sure_decoder)).then(pl.lit(" ") + sure_decoder).otherwise(pl.lit(""))
    task = pl.when((sure(Rule.TASK) >= SURE) & (first != label(Rule.TASK))).then(
        pl.concat_str(pl.lit(" ["), label(Rule.TASK).str.strip_prefix("for "), pl.lit("]"))
    ).otherwise(pl.lit(""))  # fmt: skip
    whole = pl.concat_str(first, decoder, task)
    cut = pl.when(whole.str.len_chars() > SUMMARY_WIDTH).then(whole.str.head(SUMMARY_WIDTH - 1) + "…").otherwise(whole)
    rest = (Rule.TOKENS, Rule.REGION, Rule.PLACE, Rule.DECODER, Rule.TASK)

    def stands_on(value: str) -> pl.Expr:
        """The `value` of the first part; a chain, since a confidence may be null."""
        chain = pl.when(firing.is_not_null() & by_class).then(pl.col(f"{value}_{Rule.CLASS}"))
        for rule in rest:
            chain = chain.when(label(rule).is_not_null()).then(pl.col(f"{value}_{rule}"))  # type: ignore[assignment]
        return chain

    found = wide.select("key", label=cut, evidence=stands_on("evidence"), confidence=stands_on("confidence"), source=_rules_of(wide))
    return found.drop_nulls("label")


def _rules_of(wide: pl.DataFrame) -> pl.Expr:
    """The names of the rules that gave a feature a label, in order."""
    names = [pl.when(pl.col(f"label_{rule}").is_not_null()).then(pl.lit(str(rule))) for rule in Rule]
    return pl.concat_list(names).list.drop_nulls().list.join(", ")
