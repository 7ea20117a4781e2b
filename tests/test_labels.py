"""Labels: kept, the best on the graph, taken over, and brought back; the full-text search against a naive one."""

import math
import re
import unicodedata
from collections import Counter
from datetime import datetime

import polars as pl
import pytest
from featlas.queries.labels import (
    LONGEST,
    BadLabel,
    LabelKind,
    UnknownFeature,
    adopt_labels,
    apply_labels,
    best_labels,
    checked,
    find_feature,
    graph_labels,
    known_sites,
    label_summary,
    labels_of,
    list_labels,
    remove_labels,
    restore_labels,
    search_labels,
    write_labels,
)
from featlas.queries.search import FIELDS, LONGEST_QUERY, B, BadQuery, K, parse
from featlas.queries.statistics import RunRecord, SiteRecord, StatisticsStore
from featlas.queries.store import open_graph

SITES = (SiteRecord("resid_1", 1, "d1", 2, 6), SiteRecord("resid_10", 10, "d10", 2, 6))
RUN = RunRecord("r1", "m@0", "text", "c", "activation", SITES, 1, {}, "0.1")
HOSTILE = 'it\'s "quoted"\nsecond line; DROP TABLE feature_labels; -- 🎉 שלום \u202eabc <b>&amp;</b> {{x}}'


def key(site: str, feature: int) -> str:
    return f"m@0|d{site.split('_')[1]}|{site}|{feature}"


CONTEXTS = {  # of (site, feature): before, token, after
    ("resid_1", 0): [([" The"], " pilots", [" who", " fly"]), ([" Two"], " pilots", [])],
    ("resid_1", 1): [([" A", " neigh"], "bour", [" 's", " garden"]), ([], "Pilot", ["s", " fly"])],
    ("resid_1", 2): [([" Élan", " vital"], ",", [" naïve"])],
    ("resid_10", 0): [([" 日本", "語"], "の", ["本"])],
}


@pytest.fixture
def statistics(tmp_path):
    with StatisticsStore(tmp_path) as store:
        store.start_run(RUN)
        number = {"live": True, "count": 1, "frequency": 0.5, "mean": 1.0, "variance": 1.0, "minimum": 0.0, "maximum": 1.0, "mean_active": 1.0}
        rows = [
            {"site": site.site, "layer": site.layer, "kind": "feature", "feature": i, "key": key(site.site, i), **number, "mean_magnitude": 1.0}
            for site in SITES for i in range(6)
        ]
        contexts = [
            {
                "site": site, "feature": feature, "rank": rank, "value": 9.0 - rank, "sequence": 0, "position": 1, "token_ids": [1], "before": before,
                "token": token, "after": after,
            }
            for (site, feature), found in CONTEXTS.items() for rank, (before, token, after) in enumerate(found)
        ]  # fmt: skip
        lists = {"before": pl.List(pl.String), "after": pl.List(pl.String)}
        store.finish_run("r1", 1, 10, {"feature_statistics": [pl.DataFrame(rows)], "contexts": [pl.DataFrame(contexts, schema_overrides=lists)]})
        yield store


@pytest.fixture
def graph(tmp_path):
    with open_graph(tmp_path) as store:
        nodes = [
            {"key": key(site, i), "model": "m@0", "dictionary": f"d{site.split('_')[1]}", "site": site, "kind": "feature", "index": i}
            for site in ("resid_1", "resid_10") for i in range(3)
        ]
        nodes.append({**nodes[0], "key": "m@0|d1|resid_1|error", "kind": "error", "index": -1})
        store.merge_nodes("Feature", pl.DataFrame(nodes))
        yield store


def label(feature: int, text: str, kind: str = "hand", site: str = "resid_1", **other: object) -> dict[str, object]:
    return {"key": key(site, feature), "model": "m@0", "site": site, "feature": feature, "label": text, "kind": kind, **other}


def write(statistics: StatisticsStore, *rows: dict[str, object]) -> int:
    return write_labels(statistics, pl.DataFrame(rows))


def on_graph(graph, feature: int, site: str = "resid_1") -> tuple[object, object]:
    return graph_labels(graph, [key(site, feature)]).select("label", "label_kind").row(0)


# -- keeping ---------------------------------------------------------------------------------------------------


def test_the_best_label_is_that_of_the_first_kind_and_all_are_kept(statistics):
    write(statistics, label(0, "tok", "automatic", rule="tokens"), label(0, "np", "neuronpedia", rule="e", source="s"))
    write(statistics, label(0, "by hand"), label(0, "file", "file", source="f.csv"))
    assert labels_of(statistics, [key("resid_1", 0)])["label"].to_list() == ["by hand", "file", "np", "tok"]
    assert best_labels(statistics).select("key", "label", "kind").rows() == [(key("resid_1", 0), "by hand", "hand")]
    for left, kind in (("file", "hand"), ("np", "file"), ("tok", "neuronpedia")):
        remove_labels(statistics, [key("resid_1", 0)], kind=LabelKind(kind))
        assert best_labels(statistics)["label"].to_list() == [left]


def test_of_automatic_labels_the_summary_names_a_feature_then_the_tokens_and_no_other_rule(statistics):
    write(statistics, label(0, "for x", "automatic", rule="task"))
    write(statistics, label(1, "late", "automatic", rule="place"), label(1, "a", "automatic", rule="tokens"))
    assert best_labels(statistics)["label"].to_list() == ["a"]
    write(statistics, label(1, "all", "automatic", rule="summary"))
    assert best_labels(statistics)["label"].to_list() == ["all"]
    assert labels_of(statistics, [key("resid_1", 0)])["label"].to_list() == ["for x"]


def test_a_label_replaces_the_one_of_its_identity_and_by_hand_there_is_one(statistics):
    write(statistics, label(0, "a", source="graph"), label(0, "b"))
    assert write(statistics, label(0, "c", author="Ann")) == 1
    assert labels_of(statistics, [key("resid_1", 0)]).select("label", "author").rows() == [("c", "Ann")]
    write(statistics, label(0, "x", "file", source="1"), label(0, "y", "file", source="2"), label(0, "z", "file", source="1"))
    assert sorted(labels_of(statistics, [key("resid_1", 0)]).filter(kind="file").select("label", "source").rows()) == [("y", "2"), ("z", "1")]


def test_of_one_kind_the_newest_is_best(statistics):
    day = lambda n: datetime(2025, 1, n)
    write(statistics, label(0, "old", "file", source="b", written=day(1)), label(0, "new", "file", source="z", written=day(2)))
    assert best_labels(statistics)["label"].to_list() == ["new"]


def test_every_character_comes_back_as_it_was(statistics, graph):
    text = checked(f"  {HOSTILE} ")
    write(statistics, label(0, text))
    apply_labels(graph, statistics)
    assert labels_of(statistics, [key("resid_1", 0)])["label"][0] == text == HOSTILE
    assert on_graph(graph, 0) == (HOSTILE, "hand")
    assert search_labels(graph, statistics, "DROP TABLE שלום")["label"].to_list() == [HOSTILE]


@pytest.mark.parametrize(
    ("text", "said"), [(" \n ", "at least one character"), ("x" * (LONGEST + 1), "500 characters at most, not 501"), ("a\0b", r"U\+0000"),
                       ("a\ud800", r"U\+D800"), ("a\x1b[31m", r"U\+001B")],
)  # fmt: skip
def test_what_cannot_be_a_label_is_refused(text, said):
    with pytest.raises(BadLabel, match=said):
        checked(text)
    assert checked("x" * LONGEST) == "x" * LONGEST


def test_nothing_is_written_where_one_label_is_wrong(statistics):
    for wrong in (label(1, ""), label(1, "x" * 501), label(1, "x", "bogus")):
        with pytest.raises(BadLabel, match="1 to 500"):
            write(statistics, label(0, "good"), wrong)
    assert list_labels(statistics).is_empty()
    assert label_summary(statistics).is_empty()


def test_lists_are_in_order_of_site_and_feature_and_summaries_count(statistics):
    write(statistics, label(2, "c", site="resid_10"), label(1, "b"), label(0, "a", "automatic", rule="tokens", source="x"))
    write(statistics, label(1, "q", "automatic", rule="tokens", source="y"))
    assert list_labels(statistics)["label"].to_list() == ["a", "b", "q", "c"]
    assert list_labels(statistics, site="resid_10")["label"].to_list() == ["c"]
    assert list_labels(statistics, kind=LabelKind.HAND, model="m@")["label"].to_list() == ["b", "c"]
    assert label_summary(statistics).select("kind", "rule", "source", "n").rows() == [("hand", "", "", 2), ("automatic", "tokens", "", 2)]


# -- features --------------------------------------------------------------------------------------------------


def test_features_are_found_by_key_and_by_site_and_index(statistics, graph):
    assert find_feature(graph, statistics, key("resid_10", 2))["feature"] == 2
    assert find_feature(None, statistics, "resid_10/4")["key"] == key("resid_10", 4)
    assert known_sites(graph, statistics).rows() == [("m@0", "d1", "resid_1", 6), ("m@0", "d10", "resid_10", 6)]
    for name, said in (("resid_1/6", "features 0 to 5"), ("resid_7/0", "the sites are resid_1, resid_10"), ("m@0|d1|resid_1|error", "no feature"),
                       ("resid_1/²", "no feature"), ("resid_1/-1", "no feature"), ("", "no feature")):  # fmt: skip
        with pytest.raises(UnknownFeature, match=said):
            find_feature(graph, statistics, name)


def test_a_name_that_fits_two_models_is_refused(statistics, graph):
    other = {"key": "n@0|x|resid_1|0", "model": "n@0", "dictionary": "x", "site": "resid_1", "kind": "feature", "index": 0}
    graph.merge_nodes("Feature", pl.DataFrame([other]))
    with pytest.raises(UnknownFeature, match="fits several"):
        find_feature(graph, statistics, "resid_1/0")
    assert find_feature(graph, statistics, "resid_1/0", of="n@")["key"] == "n@0|x|resid_1|0"


# -- the graph -------------------------------------------------------------------------------------------------


def test_the_graph_has_the_best_label_and_loses_one_that_is_taken_away(statistics, graph):
    write(statistics, label(0, "auto", "automatic", rule="tokens"), label(5, "not in the graph"))
    assert apply_labels(graph, statistics) == 1
    assert on_graph(graph, 0) == ("auto", "automatic")
    write(statistics, label(0, "mine"))
    assert apply_labels(graph, statistics, [key("resid_1", 0)]) == 1
    assert on_graph(graph, 0) == ("mine", "hand")
    assert apply_labels(graph, statistics) == 0
    remove_labels(statistics, kind=LabelKind.HAND)
    apply_labels(graph, statistics)
    assert on_graph(graph, 0) == ("auto", "automatic")
    remove_labels(statistics)
    apply_labels(graph, statistics)
    assert on_graph(graph, 0) == (None, None)


def test_labels_come_back_in_a_new_graph(statistics, graph, tmp_path):
    write(statistics, label(0, "mine"), label(4, "later"))
    statistics.close()
    assert restore_labels(graph, tmp_path) == 1
    node = {"key": key("resid_1", 4), "model": "m@0", "dictionary": "d1", "site": "resid_1", "kind": "feature", "index": 4}
    graph.merge_nodes("Feature", pl.DataFrame([node]))
    assert restore_labels(graph, tmp_path) == 1
    assert (on_graph(graph, 0)[0], on_graph(graph, 4)[0]) == ("mine", "later")
    assert restore_labels(graph, tmp_path / "nowhere") == 0


def test_what_people_wrote_into_the_graph_is_taken_over_and_old_automatic_names_are_not(statistics, graph):
    rows = [(0, "theirs", "hand"), (1, "somebody's", None), (2, "pilots · who", None)]
    graph.merge_nodes("Feature", pl.DataFrame([{"key": key("resid_1", i), "label": text, "label_kind": kind} for i, text, kind in rows]))
    old = pl.DataFrame({"key": [key("resid_1", 2)], "label": ["pilots · who"]})
    assert adopt_labels(graph, statistics, old) == 2
    assert best_labels(statistics).select("label", "kind", "source").rows() == [("theirs", "hand", "graph"), ("somebody's", "hand", "graph")]
    assert adopt_labels(graph, statistics, old) == 0
    write(statistics, label(2, "new", "automatic", rule="tokens"))
    apply_labels(graph, statistics)
    assert [on_graph(graph, i) for i in range(3)] == [("theirs", "hand"), ("somebody's", "hand"), ("new", "automatic")]


def test_labels_that_came_with_an_imported_graph_stand_above_automatic_ones_and_come_back(statistics, graph):
    rows = [(0, "theirs", "file"), (1, "explained", "neuronpedia")]
    graph.merge_nodes("Feature", pl.DataFrame([{"key": key("resid_1", i), "label": text, "label_kind": kind} for i, text, kind in rows]))
    token = {"key": "m@0|tokens|embed|5", "model": "m@0", "dictionary": "tokens", "site": "embed", "kind": "feature", "index": 5, "label": "<bos>"}
    graph.merge_nodes("Feature", pl.DataFrame([token]))
    assert adopt_labels(graph, statistics) == 3
    kept = dict(best_labels(statistics).select("label", "kind").iter_rows())
    assert kept == {"theirs": "file", "explained": "neuronpedia", "<bos>": "file"}
    write(statistics, label(0, "≈", "automatic", rule="summary"), label(1, "mine"))
    apply_labels(graph, statistics)
    assert [on_graph(graph, i) for i in range(2)] == [("theirs", "file"), ("mine", "hand")]
    remove_labels(statistics, kind=LabelKind.HAND)
    apply_labels(graph, statistics)
    assert on_graph(graph, 1) == ("explained", "neuronpedia")


def test_labels_without_a_kind_are_taken_over_only_where_that_is_wanted(statistics, graph):
    graph.merge_nodes("Feature", pl.DataFrame({"key": [key("resid_1", 0)], "label": ["somebody's"]}))
    assert adopt_labels(graph, statistics, of_unknown_kind=False) == 0
    assert adopt_labels(graph, statistics, keys=[key("resid_1", 1)]) == 0
    assert adopt_labels(graph, statistics, keys=[key("resid_1", 0)]) == 1


def test_measuring_again_takes_no_label_away_that_stands_in_the_graph_alone(statistics, graph, tmp_path):
    rows = [(0, "theirs", "hand"), (1, "file's", "file")]
    graph.merge_nodes("Feature", pl.DataFrame([{"key": key("resid_1", i), "label": text, "label_kind": kind} for i, text, kind in rows]))
    write(statistics, label(1, "auto", "automatic", rule="summary"))
    statistics.close()
    assert restore_labels(graph, tmp_path) == 0
    assert [on_graph(graph, i) for i in range(2)] == [("theirs", "hand"), ("file's", "file")]


# -- search ----------------------------------------------------------------------------------------------------


def naive_terms(text: str, marks: bool = False) -> list[str]:
    bare = "".join(c for c in unicodedata.normalize("NFKD", text.lower()) if unicodedata.category(c) != "Mn")
    spaced = lambda c: any(name in unicodedata.name(c, "") for name in ("CJK UNIFIED", "HIRAGANA", "KATAKANA"))
    found, word = [], ""
    for c in bare + " ":
        kind = unicodedata.category(c)
        inside = kind[0] in "LN" and not spaced(c)
        if not inside and word:
            found.append(word)
            word = ""
        if inside:
            word += c
        elif kind[0] == "S" or spaced(c) or (marks and kind[0] == "P"):
            found.append(c)
    return found


def naive_word(before: list[str], token: str, after: list[str]) -> str:
    left = re.search(r"[^\W_]+$", "".join(before)) if re.match(r"[^\W_]", token) else None
    right = re.match(r"[^\W_]+", "".join(after)) if re.search(r"[^\W_]$", token) else None
    return (left.group() if left else "") + token + (right.group() if right else "")


def naive_search(labels: dict[tuple[str, int], list[str]], query: list[tuple[str, bool]]) -> dict[str, float]:
    """BM25 by loops over documents."""
    texts: dict[str, dict[str, list[str]]] = {field: {} for field in FIELDS}
    for (site, feature), own in labels.items():
        texts["label"][key(site, feature)] = [t for text in own for t in naive_terms(text)]
    for (site, feature), own in CONTEXTS.items():
        texts["token"][key(site, feature)] = [t for one in own for t in naive_terms(naive_word(*one), True)]
        texts["context"][key(site, feature)] = [t for before, token, after in own for t in naive_terms("".join([*before, token, *after]))]
    n_all = len({k for own in texts.values() for k, terms in own.items() if terms})
    scores: Counter[str] = Counter()
    for field, own in texts.items():
        own = {k: terms for k, terms in own.items() if terms}
        mean = sum(map(len, own.values())) / len(own) if own else 0
        for term, prefix in query:
            f = {k: n for k, terms in own.items() if (n := sum(t.startswith(term) if prefix else t == term for t in terms))}
            idf = math.log(1 + (n_all - len(f) + 0.5) / (len(f) + 0.5))
            for k, n in f.items():
                scores[k] += FIELDS[field] * idf * n * (K + 1) / (n + K * (1 - B + B * len(own[k]) / mean))
    return dict(scores)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "query"),
    [("Pilots", [("pilots", False)]), ("pilot*", [("pilot", True)]), ("ELAN naive", [("elan", False), ("naive", False)]),
     ("neighbour", [("neighbour", False)]), ("the 本", [("the", False), ("本", False)]), (",", [(",", False)]),
     ("fly garden", [("fly", False), ("garden", False)])],
)  # fmt: skip
def test_scores_are_those_of_a_naive_bm25(statistics, text, query):
    labels = {("resid_1", 3): ["Pilots of the élan", "pilot fly"], ("resid_10", 5): ["the garden"]}
    write(statistics, label(3, "Pilots of the élan"), label(3, "pilot fly", "file", source="f"), label(5, "the garden", site="resid_10"))
    assert list(zip(parse(text).terms, parse(text).prefixes)) == query
    found = search_labels(None, statistics, text)
    expected = naive_search(labels, query)
    assert len(expected) > 0
    assert dict(found.select("key", "score").rows()) == pytest.approx(expected, rel=1e-12)
    assert found["score"].to_list() == sorted(found["score"], reverse=True)


def test_search_shows_where_and_keeps_to_a_site_a_model_and_fields(statistics, graph):
    write(statistics, label(0, "aviators", "automatic", rule="summary"), label(1, "pilots too", site="resid_10"))
    found = search_labels(graph, statistics, "pilots")
    assert found.select("site", "feature", "label", "label_kind", "text").rows()[:2] == [
        ("resid_1", 0, "aviators", "automatic", " The【 pilots】 who fly"), ("resid_10", 1, "pilots too", "hand", "pilots too"),
    ]  # fmt: skip
    assert search_labels(graph, statistics, "pilots", site="resid_10")["feature"].to_list() == [1]
    assert search_labels(graph, statistics, "pilots", model="other@0").is_empty()
    assert search_labels(graph, statistics, "pilots", fields=("label",))["site"].to_list() == ["resid_10"]
    assert search_labels(graph, statistics, "pilots", 1).height == 1
    assert search_labels(graph, statistics, "absent").schema == found.schema


def test_the_index_follows_the_labels(statistics):
    write(statistics, label(0, "zebra"))
    assert search_labels(None, statistics, "zebra").height == 1
    write(statistics, label(0, "okapi"))
    assert search_labels(None, statistics, "zebra").is_empty()
    assert search_labels(None, statistics, "okapi").height == 1
    remove_labels(statistics)
    assert search_labels(None, statistics, "okapi").is_empty()


def test_a_store_open_for_reading_gives_the_same_answer_and_keeps_nothing(statistics, tmp_path):
    write(statistics, label(0, "pilots fly"))
    path = statistics.path
    statistics.close()
    with StatisticsStore(path, read_only=True) as reading:
        first = search_labels(None, reading, "pilots fly")
        assert search_labels(None, reading, "pilots fly").equals(first)
        assert reading.query("SELECT * FROM search_origins").is_empty()
    with StatisticsStore(path) as writing:
        assert search_labels(None, writing, "pilots fly").equals(first)
        assert writing.query("SELECT origin FROM search_origins")["origin"].to_list() == ["r1"]


def test_a_run_that_is_deleted_is_found_no_more(statistics):
    assert search_labels(None, statistics, "garden").height == 1
    statistics.delete_run("r1")
    assert search_labels(None, statistics, "garden").is_empty()
    assert statistics.query("SELECT * FROM search_terms").is_empty()


@pytest.mark.parametrize("text", ["", "  ", "\u0301", "x" * (LONGEST_QUERY + 1)])
def test_a_text_without_words_cannot_be_searched(statistics, text):
    with pytest.raises(BadQuery):
        search_labels(None, statistics, text)
