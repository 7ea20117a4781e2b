"""What the ingest job asks of a graph about its own runs: which sequences are done, started, finished."""

from .store import GraphStore

ATTRIBUTION_PATCHING = "attribution patching"
"""`Run.method` of effective edges measured at one step."""


def done_sequences(store: GraphStore, run: str) -> frozenset[str]:
    """Keys of the sequences whose edges are committed for `run`."""
    rows = store.query("MATCH (r:Run)-[m:ON_SEQUENCE]->(s:Sequence) WHERE r.key = $run AND m.status = 'done' RETURN s.key AS sequence", {"run": run})
    return frozenset(rows["sequence"].to_list()) if len(rows) else frozenset()


def mark_started(store: GraphStore, run: str) -> None:
    """Set a new run's status to `running`; a run that has a status keeps it."""
    store.query("MATCH (r:Run) WHERE r.key = $run AND r.status IS NULL SET r.status = 'running'", {"run": run}, write=True)


def mark_finished(store: GraphStore, run: str, *, n_sequences: int) -> None:
    """Set a run's status to `done` and its counts."""
    total = store.query("MATCH (r:Run)-[m:ON_SEQUENCE]->(:Sequence) WHERE r.key = $run RETURN sum(m.n_edges) AS n_edges", {"run": run})
    store.query(
        "MATCH (r:Run) WHERE r.key = $run SET r.status = 'done', r.n_sequences = $n_sequences, r.n_edges = $n_edges",
        {"run": run, "n_sequences": n_sequences, "n_edges": int(total["n_edges"][0] or 0)},
        write=True,
    )
