"""`golden`: the script `scripts/golden.py`, which is a module of no package, for the tests."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_spec = spec_from_file_location("golden_script", Path(__file__).parents[1] / "scripts" / "golden.py")
assert _spec is not None
assert _spec.loader is not None
golden = module_from_spec(_spec)
sys.modules[_spec.name] = golden  # where its dataclasses look for themselves
_spec.loader.exec_module(golden)
