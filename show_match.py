"""Aligned samples and matchings as tables that a person reads."""

import polars as pl

from . import console
from .analysis.matching import Matching, correspondence
from .analysis.matching_plots import short_model, side_names
from .analysis.notes import readable
from .queries.matches import Aligned

WIDEST = 10
"""Sites of B side by side in a table; of more only the best are told."""


def size(n_bytes: int) -> str:
    """A file's size."""
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes >= 1e5 else f"{n_bytes / 1e3:,.1f} kB"


def show_aligned(aligned: Aligned, *, known: bool) -> None:
    """What was aligned."""
    there = ", there already" if known else ""
    tokens = aligned.settings["tokens_per_segment"]
    drawn = aligned.a.run.n_sequences
    available = aligned.settings["n_available"]
    some = f" (of {available:,}, drawn by seed {aligned.settings['seed']})" if available > drawn else ""
    console.say(f"aligned {aligned.key}{there}: {aligned.n_segments:,} segments of {drawn:,} sequences{some}")
    if tokens[0] == tokens[1] == 1.0:
        console.say("both tokenizers cut the text alike: a segment is a token")
    else:
        console.say(f"a segment is {tokens[0]:.2f} tokens of A and {tokens[1]:.2f} of B; of several the {aligned.settings['pool']} counts")
    rows = [
        (name, short_model(side.model), site.site, site.dictionary, f"{site.d_sae:,}", f"{site.mean_l0:.1f}", size(site.n_bytes))
        for name, side in (("A", aligned.a), ("B", aligned.b))
        for site in side.run.sites
    ]
    console.table(("side", "model", "site", "dictionary", "features", "mean L0", "size"), rows)
    console.say(f"in {aligned.folder}; next: featlas analyze match {aligned.key[:8]}")


def show_matching(matching: Matching, contexts: pl.DataFrame, *, known: bool) -> None:
    """What was found: how much, which site is which, and the best pairs with the text on which both are strong."""
    overall, settings = matching.overall, matching.settings
    console.heading("A {}, B {}: matching {}".format(*side_names(matching), matching.key))
    if known:
        console.say("found before; --again computes it anew")
    if overall["threshold"] is None:
        console.say(
            f"no match: none of the {overall['n_mutual']:,} mutual nearest neighbours of {overall['n_a']:,} and {overall['n_b']:,} live features is "
            f"more than chance at a false discovery rate of {settings['fdr']:g}"
        )
        _say_why(matching)
    else:
        console.say(
            f"{overall['n_matched']:,} pairs over all sites: {overall['share_a']:.1%} of {overall['n_a']:,} live features of A, "
            f"{overall['share_b']:.1%} of {overall['n_b']:,} of B (by chance {overall['null_share']:.2%})"
        )
        null = "exchanged sequences" if settings["null"] == "sequences" else "shifted rows"
        chance = f"false discovery rate {settings['fdr']:g} by {settings['draws']} draws of {null}, seed {settings['seed']}"
        console.say(f"r ≥ {overall['threshold']:.3f}, mean {overall['mean_score']:.3f}; {chance}")
    _show_correspondence(matching.sites)
    _show_grid(matching.sites)
    if contexts.height:
        console.heading("Best pairs over all sites, one for each text, and where both are strongest")
        rows = contexts.select("site_a", "feature_a", "site_b", "feature_b", "score", "texts").iter_rows()
        said = lambda texts: " · ".join(readable(text) for text in texts)
        console.table(("A", "B", "r", "both strongest at"), [(f"{a}/{i}", f"{b}/{j}", f"{r:.3f}", said(texts)) for a, i, b, j, r, texts in rows])


def _say_why(matching: Matching) -> None:
    """Of a search without a match: how far scores and chance reach, and the other chance where texts that are made alike leave this one no room."""
    scores = matching.scores.filter(pl.col("site_a") == "")
    reached = [low for name in ("n", "null_n") if isinstance(low := scores.filter(pl.col(name) > 0)["low"].max(), float)]
    if len(reached) < 2:
        return
    console.say("their r reaches {:.2f}, chance's {:.2f}".format(*reached))
    if matching.settings["null"] == "sequences":
        console.say("exchanging texts that are made alike, from a few patterns, changes next to nothing: --null shift moves rows instead")


def _show_correspondence(sites: pl.DataFrame) -> None:
    found = correspondence(sites)
    if sites["site_a"].n_unique() * sites["site_b"].n_unique() == 1:
        return
    console.heading("Which site of B each site of A is most like")
    said = lambda row, name, form: "–" if row[f"by_{name}"] is None else f"{row[f'by_{name}']} ({row[name]:{form}})"
    rows = [
        (row["site_a"], said(row, "share", ".1%"), said(row, "cka", ".3f"), said(row, "svcca", ".3f"), row["by_path"] or "–")
        for row in found.iter_rows(named=True)
    ]
    console.table(("A", "features matched", "CKA", "SVCCA", "matched, in order"), rows)


def _show_grid(sites: pl.DataFrame) -> None:
    """Every pair of sites, or of too many the best of each."""
    rows = sites
    if sites["site_b"].n_unique() > WIDEST:
        rows = sites.filter(pl.col("share_a") == pl.col("share_a").max().over("site_a")).unique("site_a", keep="first", maintain_order=True)
    console.heading("Pairs of sites" if rows.height == sites.height else "The best pair of sites of each site of A")
    number = lambda value, form: "–" if value is None else format(value, form)
    lines = [
        (
            row["site_a"], row["site_b"], f"{row['n_a']:,}", f"{row['n_b']:,}", f"{row['n_matched']:,}", f"{row['share_a']:.1%}",
            f"{row['share_b']:.1%}", f"{row['null_share']:.2%}", *(number(row[name], ".3f") for name in ("threshold", "mean_score", "cka", "svcca")),
        )
        for row in rows.iter_rows(named=True)
    ]  # fmt: skip
    columns = ("A", "B", "live A", "live B", "matched", "of A", "of B", "chance", "r ≥", "mean r", "CKA", "SVCCA")
    console.table(columns, lines)
