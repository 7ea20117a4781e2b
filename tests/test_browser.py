"""The graph in the real Neo4j Browser: a Chromium logs in, asks in Cypher and sees the nodes drawn."""

import struct
from pathlib import Path

import pytest

from .chromium import CHROMIUM
from .servers import Neo4jTestServer, browser_screenshot

pytestmark = [pytest.mark.neo4j, pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install chromium")]

# the singer of a sentence, its verb and an error node, as an ingest would write them
SMALL_GRAPH = """
CREATE (a:Feature {key: 'm|d|resid_5|11', site: 'resid_5', kind: 'feature', index: 11, label: 'plural noun'}),
       (b:Feature {key: 'm|d|resid_5|error', site: 'resid_5', kind: 'error', label: 'error'}),
       (c:Feature {key: 'm|d|resid_9|4', site: 'resid_9', kind: 'feature', index: 4, label: 'plural verb'}),
       (y:Feature {key: 'm|-|y|logit_diff', site: 'y', kind: 'output', label: 'logit_diff'}),
       (a)-[:INFLUENCES {run: 'r', weight: 1.5}]->(c), (b)-[:INFLUENCES {run: 'r', weight: -0.5}]->(c), (c)-[:INFLUENCES {run: 'r', weight: 2.0}]->(y)
"""


def test_browser_logs_in_and_draws_the_graph(clean_neo4j: Neo4jTestServer, tmp_path: Path) -> None:
    clean_neo4j.run(SMALL_GRAPH)
    picture = tmp_path / "browser.png"
    drawn = browser_screenshot(clean_neo4j, "MATCH p = (:Feature)-[:INFLUENCES]->(:Feature) RETURN p", picture)
    assert drawn == 4
    header = picture.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", header[16:]) == (1400, 1000)
