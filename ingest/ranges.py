"""Numbers and choices that are refused by themselves, before anything large is imported, loaded or written."""

from ..errors import UserError


def check_numbers(
    *,
    steps: int = 1,
    threshold: float = 0.0,
    max_edges: int | None = None,
    tolerance: float = 0.0,
    screen: float | None = None,
    memory: int = 2**24,
    noise_scale: float = 1.0,
    limit: int | None = None,
    batch_size: int | None = None,
    workers: int = 1,
) -> None:
    """Raise a `UserError` that names the option for a number out of its range."""
    if steps < 1:
        raise UserError(f"--steps {steps} is no number of steps: give 1 (attribution patching) or more (integrated gradients)")
    if not threshold >= 0:
        raise UserError(f"--threshold {threshold} is negative: it is compared with |effect|, give 0 or more")
    if max_edges is not None and max_edges < 1:
        raise UserError(f"--max-edges {max_edges} keeps nothing: give at least 1, or leave it out to keep all")
    if not tolerance >= 0:
        raise UserError(f"--tolerance {tolerance} is negative: it is a relative error, give 0 (all exact) or more")
    if screen is not None and not screen > 0:
        raise UserError(f"--screen {screen} screens nothing: give an effect above 0, or leave it out")
    if not 0 < noise_scale < float("inf"):
        raise UserError(f"--noise-scale {noise_scale} makes no noise: give a finite number of standard deviations above 0")
    if memory < 2**24:
        raise UserError(f"--memory of {memory} bytes is too little: give at least 16MB")
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit} leaves no sequence: give at least 1")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"--batch-size {batch_size} is too small: give at least 1")
    if workers < 1:
        raise UserError(f"--workers {workers}: there must be one at least")


def check_baseline(baseline: str, statistics_run: str | None, *, per_position: bool) -> None:
    """Raise a `UserError` where a baseline lacks the run that its moments come from, or is given what it does not take."""
    if baseline in ("mean", "noise") and statistics_run is None:
        raise UserError(f"--baseline {baseline} needs --statistics-run: run `featlas ingest statistics` first, it prints the run's name")
    if per_position and baseline != "mean":
        raise UserError(f"--mean per-position is of --baseline mean, not of {baseline}: take that one, or leave it out")
