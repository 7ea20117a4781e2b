"""What a manifest says of the machine that measured: by what its numbers are rounded, and whether they would come again bit by bit."""

import os
import platform
import re
from typing import NamedTuple

import torch


class Determinism(NamedTuple):
    """Whether the same command on the same machine gives the same bits, and why."""

    deterministic: bool
    why: str


def determinism(device: str) -> Determinism:
    """Of what is measured on a device or a placement (`cpu`, `cuda:0`, `cpu+disk`, `auto`), as torch is set now."""
    kind = _least_certain(device)
    if kind == "cpu":
        threads = torch.get_num_threads()
        return Determinism(True, f"cpu: the same sums in the same order, for {threads} thread{'s' if threads > 1 else ''} and this kind of processor")
    if kind == "cuda":
        asked, workspace = torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")
        if asked and workspace in (":4096:8", ":16:8"):
            return Determinism(True, f"cuda: deterministic algorithms are on, CUBLAS_WORKSPACE_CONFIG={workspace}")
        missing = "torch.use_deterministic_algorithms is off" if not asked else "CUBLAS_WORKSPACE_CONFIG is not :4096:8"
        return Determinism(False, f"cuda: atomic additions come in any order ({missing})")
    return Determinism(False, f"{kind}: torch promises nothing for this kind of device")


def _least_certain(device: str) -> str:
    """The kind of device among those of a placement of which least is promised; where weights rest changes no sum."""
    named = re.findall(r"cuda|mps|xpu|cpu", device) if not device.endswith(".json") else []
    if not named:
        if not (device.endswith(".json") or device in ("auto", "balanced")):
            return device.partition(":")[0]
        # a placement by what there is, or of a file: any accelerator of this machine may be in it
        named = ["cuda"] if torch.cuda.is_available() else ["mps"] if torch.backends.mps.is_available() else ["cpu"]
    return next((kind for kind in ("mps", "xpu", "cuda") if kind in named), "cpu")


def described(device: str) -> dict[str, object]:
    """`deterministic`, `why`, and what rounding depends on: device, threads, processor, BLAS."""
    found = determinism(device)
    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    hardware: dict[str, object] = {"processor": platform.machine(), "instructions": torch.backends.cpu.get_cpu_capability()}
    hardware |= {"cores": os.cpu_count(), "blas": blas[1] if blas else "unknown"}
    if _least_certain(device) == "cuda" and torch.cuda.is_available():
        hardware |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return {"device": device, "threads": torch.get_num_threads(), "deterministic": found.deterministic, "why": found.why, "hardware": hardware}
