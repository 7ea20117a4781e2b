"""A plan as tables that a person reads."""

from collections.abc import Sequence

from . import console
from .ingest.planning import Plan


def amount(n_bytes: int) -> str:
    """Bytes in the greatest unit of which there are some."""
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "KB")):
        if n_bytes >= 1024**power:
            return f"{n_bytes / 1024**power:,.1f} {unit}"
    return f"{n_bytes} B"


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, runs of them written short: 0-3, 7."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in found)


def show(plan: Plan) -> None:
    """The model, its weights by type, where everything goes, the dictionaries, the working memory."""
    tied = ", the output head is the embedding" if plan.tied else ""
    console.say(f"{plan.name}: {plan.family}, {plan.n_layers} layers, {plan.d_model} wide, {plan.parameters:,} parameters{tied}")
    itemsize = plan.bytes_by_dtype[plan.dtype] // plan.parameters
    parts = [(part.name, f"{part.parameters:,}", part.times, amount(part.parameters * part.times * itemsize)) for part in plan.parts]
    console.table(("part", "parameters", "times", plan.dtype), parts)
    console.say("weights: " + ", ".join(f"{amount(size)} in {dtype}" for dtype, size in plan.bytes_by_dtype.items()))
    console.table(
        ("device", "layers", "weights", "dictionaries"),
        [
            (f"{p.device} (at rest)" if p.rests else p.device, ranges(p.layers) or "none", amount(p.weights), amount(p.dictionaries))
            for p in plan.places
        ],
    )
    if plan.dictionaries:
        rows = [(one.site, f"{one.d_sae:,}", f"{one.d_in:,}", amount(one.bytes), one.device) for one in plan.dictionaries]
        console.table(("dictionary", "features", "width", "memory", "device"), rows)
    _working(plan)


def _working(plan: Plan) -> None:
    working = plan.working
    if working is None:
        console.say("working memory: not known without dictionaries; name them, or their size by --features")
        return
    console.say(
        f"a run at {working.length} tokens, {working.steps} step{'s' if working.steps > 1 else ''}: {amount(working.sequence)} for a sequence, "
        f"{amount(working.lane)} for a row of the largest local function"
        + (f", {amount(working.tail_row)} for a row of the model's tail" if working.tail_row else "")
    )
    if working.fits:
        console.say(f"within --memory {amount(working.memory)}: {working.batch} at a time")
    else:
        more = f"more than --memory {amount(working.memory)}"
        console.say(f"one sequence takes {amount(working.least)} at once, {more}: allow it, or take shorter prompts")
