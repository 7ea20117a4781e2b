"""The command `featlas plan`: what a model and a run would take, before anything is loaded."""

from typing import Annotated

import typer

from . import checks, console
from .options import BadParameterValue, Device, Dtype, Json, Memory, Model, Sites, Steps, app, memory_bytes, split_names


@app.command("plan")
def plan_command(
    model: Model = "smollm2",
    dictionaries: Annotated[
        str | None, typer.Option("--dictionaries", help="A folder of dictionaries (their headers are read), identity, or identity-heads.")
    ] = None,
    features: Annotated[
        int | None, typer.Option("--features", callback=checks.at_least_one, help="Instead: dictionaries of so many features at --sites.")
    ] = None,
    sites: Sites = None,
    device: Device = "cpu",
    machine: Annotated[
        str | None, typer.Option("--machine", help="Plan for another machine, by its free memory: cuda:0=80GB,cuda:1=80GB,cpu=200GB.")
    ] = None,
    dtype: Dtype = "float32",
    length: Annotated[int, typer.Option("--length", callback=checks.at_least_one, help="Tokens of the longest prompt.")] = 64,
    steps: Steps = 1,
    memory: Memory = "2GB",
    as_json: Json = False,
) -> None:
    """Bytes of a model and its dictionaries, where each layer would go, and a run's working memory, without loading a weight."""
    from dataclasses import asdict

    from . import show_plan
    from .ingest.planning import PlanOptions, plan
    from .model.sites import parse_site

    chosen = tuple(parse_site(name) for name in split_names(sites)) if sites else None
    found = plan(
        PlanOptions(
            model, dictionaries, features, chosen, device=device, dtype=dtype, length=length, steps=steps, memory=memory_bytes(memory),
            machine=_machine(machine) if machine else None,
        )
    )
    if as_json:
        console.say_json(asdict(found))
    else:
        show_plan.show(found)


def _machine(text: str) -> dict[str, int]:
    """Device → free bytes."""
    from .model.placement import parse_bytes

    found = {}
    for part in split_names(text):
        device, _, amount = part.partition("=")
        free = parse_bytes(amount)
        if free is None or not (device in ("cpu", "mps") or device.removeprefix("cuda:").isdecimal()):
            raise BadParameterValue(f"--machine {part!r} is no device with its memory: write cuda:0=80GB,cpu=200GB")
        found[device] = free
    return found
