"""`featlas analyze heads` as a user calls it, on a tiny model with made parcellations."""

import json

import numpy as np
import polars as pl
import pytest
from featlas.analysis.parcellation import PATH_SCORES, Level, Parcellation, SitePartition
from featlas.analysis.regions_store import write_parcellation
from featlas.cli import app
from featlas.errors import UserError
from featlas.model.dictionary_sources import load_dictionaries
from featlas.model.loading import load_model
from featlas.model.sites import parse_site
from featlas.queries.statistics import StatisticsStore
from typer.testing import CliRunner

from .micro import save_tiny

pytestmark = pytest.mark.slow  # each runs whole commands or sweeps

SCORES = pl.DataFrame(schema=dict(PATH_SCORES))


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """A tiny model, a task of pairs, and an atlas with a parcellation of the neurons of attn_1 and of resid_1."""
    folder = tmp_path_factory.mktemp("heads")
    model = save_tiny(folder / "model" / "tiny", "llama")
    pairs = [{"clean": f"w1 w{i} w3 w4", "corrupt": f"w2 w{i + 9} w3 w4", "answer": " w5", "wrong_answer": " w6"} for i in range(4)]
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(pair) for pair in pairs))
    loaded = load_model(str(model))
    sites = [parse_site(name) for name in ("attn_1", "resid_1")]
    found = load_dictionaries("identity-heads", loaded, sites=sites)
    heads, other = np.repeat(np.arange(4), 4), np.tile(np.arange(4), 4)
    labels = {"attn_1": heads, "resid_1": other}
    own = {s.name: SitePartition(s.name, found[s].id, 16, np.arange(16), (Level("given", labels[s.name]),), 0, SCORES) for s in sites}
    with StatisticsStore(folder / "atlas") as statistics:
        write_parcellation(statistics, Parcellation("beef00", "samples", loaded.key, "ward", "activation", own, {"seed": 0}))
    named = ["--model", model, "--task", folder / "pairs.jsonl", "--atlas", folder / "atlas"]
    return lambda *more: CliRunner().invoke(app, list(map(str, ["analyze", "heads", *named, *more])))


def said(result):
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


def test_neurons_of_heads_are_their_parcellation(setup, tmp_path):
    neurons = ("--site", "attn_1", "--dictionaries", "identity-heads")
    found = said(setup(*neurons, "--parcellation", "beef", "--json", "--output", tmp_path / "heads.csv"))
    assert (found["method"], found["features"], found["ambiguity"]) == ("membership", 16, 0)
    assert [row["features"] for row in found["heads"]] == [4, 4, 4, 4]
    assert found["overlap"]["ami"] == pytest.approx(1)
    assert found["overlap"]["p"] < 0.01
    assert found["alluvial"]["right_order"] == [f"head 1.{h}" for h in range(4)]
    assert pl.read_csv(tmp_path / "heads.csv").select("head", "block").rows() == [(i // 4, i // 4) for i in range(16)]
    shown = setup(*neurons, "--parcellation", "latest")
    assert "AMI 1.000" in shown.output
    assert "100% of the features are of their block's first head" in shown.output


@pytest.mark.parametrize("method", ["effective", "structural", None])
def test_heads_of_a_residual_stream(setup, method, tmp_path):
    more = [] if method is None else ["--method", method]
    result = setup("--site", "resid_1", "--dictionaries", "identity", "--parcellation", "beef", "--json", "--output", tmp_path / "of.parquet", *more)
    found = said(result)
    assert found["method"] == (method or "effective")
    assert len(found["heads"]) == 8, "two layers write resid_1"
    assert 0 < found["ambiguity"] < 1
    assert sum(row["features"] for row in found["heads"]) == found["features"] == pl.read_parquet(tmp_path / "of.parquet").height
    assert sum(row["share"] for row in found["heads"]) == pytest.approx(1)
    assert sum(row["n"] for row in found["overlap"]["contingency"]) == found["overlap"]["features"]


def test_a_chosen_site_before_leaves_the_heads_between(setup):
    found = said(setup("--site", "resid_1", "--dictionaries", "identity", "--sites", "resid_0", "--json"))
    assert {row["layer"] for row in found["heads"]} == {1}


def test_what_encoders_read_of_heads(setup):
    found = said(setup("--site", "attn_1", "--dictionaries", "identity", "--baseline", "zero", "--json"))
    assert (found["method"], len(found["heads"]), found["features"]) == ("encoder", 4, 16)
    slices = said(setup("--site", "attn_1", "--dictionaries", "identity-heads", "--method", "encoder", "--json"))
    assert slices["ambiguity"] == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--site", "attn_1", "--dictionaries", "identity", "--method", "decoder"), "no heads' slices"),
        (("--site", "attn_1", "--dictionaries", "identity", "--method", "membership"), "identity on the heads' outputs"),
        (("--site", "attn_1", "--dictionaries", "identity", "--method", "effective"), "take --method encoder"),
        (("--site", "mlp_1", "--dictionaries", "identity"), "no head writes mlp_1"),
        (("--site", "attn_1", "--dictionaries", "identity", "--parcellation", "beef"), "of dictionary identity-heads at attn_1, not identity"),
        (("--site", "resid_0", "--dictionaries", "identity", "--parcellation", "beef"), "no partition of resid_0: it has attn_1, resid_1"),
        (("--site", "resid_1", "--dictionaries", "identity", "--parcellation", "feed"), "feed"),
        (("--site", "resid_1", "--dictionaries", "identity", "--parcellation", "beef", "--level", "3"), "levels 0 to 0, not 3"),
        (("--site", "resid_1", "--dictionaries", "identity", "--output", "heads.txt"), "neither .parquet nor .csv"),
        (("--site", "resid_1", "--dictionaries", "identity", "--parcellation", "latest", "--atlas", "/nowhere"), "has no statistics"),
    ],
)
def test_mistakes_are_said(setup, more, message):
    result = setup(*more)
    assert isinstance(result.exception, UserError), result.output
    assert message in str(result.exception)
