"""Run featlas in a process of its own that says when its slow imports are done: something to interrupt while it works.

    python -m tests.interrupted_child ingest edges …
"""

import signal
import sys

if __name__ == "__main__":
    # A shell's background jobs have their interrupts ignored, and their children too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["featlas", *sys.argv[1:]]
    import sae_lens  # noqa: F401
    from featlas import cli
    from featlas.ingest import pipeline, samples, statistics  # noqa: F401
    from featlas.model import dictionary_sources, training  # noqa: F401

    print("ready", flush=True)
    cli.main()
