"""What the ingest job asks of a graph about its own runs: which there are, which sequences are done, when one is finished."""

from .store import GraphStore

ATTRIBUTION_PATCHING = "attribution patching"
"""`Run.method` of effective edges measured at one step."""

RUNNING, DONE = "running", "done"
"""`Run.status` while sequences are missing, and once all planned ones are in."""


def exists(store: GraphStore, run: str) -> bool:
    """Whether the graph has the run."""
    return len(store.query("MATCH (r:Run) WHERE r.key = $run RETURN r.key AS run", {"run": run})) > 0


def done_sequences(store: GraphStore, run: str) -> frozenset[str]:
    """Keys of the sequences whose edges are committed for `run`."""
    rows = store.query("MATCH (r:Run)-[m:ON_SEQUENCE]->(s:Sequence) WHERE r.key = $run AND m.status = 'done' RETURN s.key AS sequence", {"run": run})
    return frozenset(rows["sequence"].to_list()) if len(rows) else frozenset()


def record_counts(store: GraphStore, run: str, *, n_sequences: int) -> None:
    """Set a run's counts, and its status: `done` where no planned sequence is missing."""
    total = store.query("MATCH (r:Run)-[m:ON_SEQUENCE]->(:Sequence) WHERE r.key = $run RETURN sum(m.n_edges) AS n_edges", {"run": run})
    store.query(
        "MATCH (r:Run) WHERE r.key = $run SET r.n_sequences = $n_sequences, r.n_edges = $n_edges,"
        " r.status = CASE WHEN r.n_planned > $n_sequences THEN $running ELSE $done END",
        {"run": run, "n_sequences": n_sequences, "n_edges": int(total["n_edges"][0] or 0), "running": RUNNING, "done": DONE},
        write=True,
    )
