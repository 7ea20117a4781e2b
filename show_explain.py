"""One ablated pass and one attribution as tables that a person reads."""

from typing import TYPE_CHECKING

from . import console
from .analysis.drawings import called, number, token

if TYPE_CHECKING:
    from .explain import ExplainedAblation, ExplainedAttribution


def show_ablation(shown: "ExplainedAblation") -> None:
    """The steps of one target, then what the output is."""
    target, names, tokens, steps = shown.target, shown.scene.names, shown.scene.tokens, shown.steps
    console.heading(f"{called(target.site, target.node, names)}, at {token(tokens, target.position)}, in a circuit of {shown.n_edges} edges")
    console.say(shown.scene.subtitle)
    console.heading("1. The circuit's edges into it")
    rows = [
        (called(one.site, one.node, names), token(tokens, one.position), number(one.baseline), number(one.clean), number(one.alive))
        for one in target.sources
    ]
    console.table(("source", "at", "baseline", "clean run", "what it reads"), rows)
    console.say(f"{target.n_cut:,} other nodes that it could read, and that the clean run moves, stay at their baseline; error nodes by their norms")
    console.say(f"2. its private input goes {100 * target.way:.1f} % of the way from the baseline to the clean value")
    if target.site != "y":
        console.say(f"3. the local function of {target.site} runs on it; 4. of its value {target.n_entries:,} features are active")
        console.say(f"5. kept: {number(target.value)} (clean run {number(target.clean)}, baseline {number(target.baseline)})")
    phi = "undefined" if steps.faithfulness is None else number(steps.faithfulness)
    measured = f"m(∅) {number(steps.metric_empty)}, m(C) {number(steps.metric)}, m(M) {number(steps.metric_full)}"
    console.say(f"the output of the whole pass: {measured}, φ = {phi}")


def show_attribution(shown: "ExplainedAttribution") -> None:
    """Each step of one edge, and how its weight comes about."""
    steps, names, tokens = shown.steps, shown.scene.names, shown.scene.tokens
    ends = [f"{called(*end[:2], names)} at {token(tokens, end[2])}" for end in (steps.source, steps.target)]
    console.heading(f"{ends[0]} → {ends[1]}")
    console.say(shown.scene.subtitle)
    rows = [
        (f"{one.alpha:.2g}", number(one.value), number(one.metric), number(one.slope_metric), number(one.slope_local), number(one.slope))
        for one in steps.steps
    ]
    console.table(("α", "f_d(α)", "m(α)", "∂m/∂f_d", "∂f_d/∂u", "product"), rows)
    change = f"(clean {number(steps.clean)} − baseline {number(steps.baseline)})"
    console.say(f"mean slope {number(steps.mean_slope)} × {change} = {number(steps.effect)}, the edge's weight")
    whole = number(steps.metric_clean - steps.metric_start)
    console.say(f"all edges into d add up to {number(steps.total)}; m(clean) − m(d alone from the baseline) is {whole}")
