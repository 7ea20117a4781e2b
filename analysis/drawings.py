"""Drawings of one ablated forward pass and of one attribution, panel by panel, as SVG: what `steps` recorded, and nothing else.

Plain SVG with its own white ground: it opens by itself, in a page, in any browser. Every name is escaped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from ..model.masks import ERROR
from .notes import readable
from .steps import AblationSteps, AttributionSteps, TargetSteps

Names = Mapping[tuple[str, int], str]
"""(site, node's number) → what it is called."""

WIDTH, MARGIN, INDENT = 900, 28, 64
INK, SOFT, LINE, CLEAN, BASE, ALIVE = "#1f2328", "#656d76", "#d0d7de", "#0a7d4f", "#8c959f", "#bc4c00"
_SHOWN_SOURCES = 6


@dataclass
class Sheet:
    """A drawing that grows downwards; `y` is where the next thing goes."""

    parts: list[str] = field(default_factory=list)
    y: float = 0.0
    panels: int = 0

    def text(self, x: float, y: float, text: str, *, size: float = 13, colour: str = INK, anchor: str = "start", bold: bool = False) -> None:
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{colour}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, *, colour: str = LINE, width: float = 1.5, dashed: bool = False) -> None:
        dash = ' stroke-dasharray="4 4"' if dashed else ""
        self.parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width:g}"{dash}/>')

    def rect(self, x: float, y: float, width: float, height: float, *, fill: str, stroke: str = "none", radius: float = 2) -> None:
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}" rx="{radius:g}" fill="{fill}"'
            f' stroke="{stroke}"/>'
        )

    def dot(self, x: float, y: float, *, colour: str, hollow: bool = False, radius: float = 5) -> None:
        fill = "white" if hollow else colour
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{fill}" stroke="{colour}" stroke-width="2"/>')

    def path(self, points: Sequence[tuple[float, float]], *, colour: str) -> None:
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="2"/>')

    def head(self, title: str, subtitle: str) -> None:
        self.text(MARGIN, 40, title, size=20, bold=True)
        self.y = 62
        for line in wrapped(subtitle, 128):
            self.text(MARGIN, self.y, line, colour=SOFT)
            self.y += 18
        self.y += 12

    def panel(self, title: str, said: str) -> None:
        """The next step's number, name and sentence."""
        if self.panels:
            self.line(MARGIN, self.y, WIDTH - MARGIN, self.y, width=1)
            self.y += 24
        self.panels += 1
        self.parts.append(f'<circle cx="{MARGIN + 12}" cy="{self.y + 8:.1f}" r="13" fill="{INK}"/>')
        self.text(MARGIN + 12, self.y + 13, str(self.panels), colour="white", anchor="middle", bold=True)
        self.text(INDENT, self.y + 13, title, size=15, bold=True)
        self.y += 34
        for line in wrapped(said, 122):
            self.text(INDENT, self.y, line, colour=SOFT)
            self.y += 18
        self.y += 10

    def svg(self) -> str:
        """The whole drawing."""
        height = self.y + 16
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}" '
            f'font-family="system-ui, -apple-system, \'Segoe UI\', \'DejaVu Sans\', sans-serif" role="img">\n'
            f'<rect width="{WIDTH}" height="{height:.0f}" fill="white"/>\n' + "\n".join(self.parts) + "\n</svg>\n"
        )


def wrapped(text: str, width: int) -> list[str]:
    """Words in lines of at most `width` characters; a longer word has a line of its own."""
    lines: list[str] = []
    for word in text.split():
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def number(value: float, digits: int = 3) -> str:
    """A number as it stands in a drawing."""
    text = f"{value:.{digits}g}" if abs(value) < 99.5 else f"{value:,.0f}"
    return text.replace("-", "−")


def called(site: str, node: int, names: Names, width: int = 34) -> str:
    """What a node is called, and where it stands."""
    if site == "y":
        return readable(names.get((site, node), "output"), width)
    own = "error node" if node == ERROR else names.get((site, node), f"feature {node}")
    place = site if node == ERROR else f"{site}/{node}"
    return f"{place}  {readable(own, width)}"


def token(tokens: Sequence[str], position: int) -> str:
    """A position with its token."""
    return f"“{readable(tokens[position], 16)}” ({position})" if 0 <= position < len(tokens) else str(position)


@dataclass(frozen=True)
class _Scale:
    """Values to places on a line."""

    low: float
    high: float
    left: float
    right: float

    @staticmethod
    def over(values: Sequence[float], left: float, right: float) -> "_Scale":
        low, high = min(values), max(values)
        room = 0.06 * (high - low) or max(abs(high), 1.0)
        return _Scale(low - room, high + room, left, right)

    def __call__(self, value: float) -> float:
        return self.left + (value - self.low) / (self.high - self.low) * (self.right - self.left)


def _number_line(sheet: Sheet, marks: Sequence[tuple[str, float, str, bool]], *, left: float = INDENT + 20, right: float = WIDTH - 90) -> None:
    """Values on one line, (name, value, colour, hollow): names above and below in turn, so that near ones do not collide."""
    scale = _Scale.over([value for _, value, _, _ in marks], left, right)
    y = sheet.y + 30
    sheet.line(left, y, right, y, width=2)
    for i, (name, value, colour, hollow) in enumerate(sorted(marks, key=lambda mark: mark[1])):
        x = scale(value)
        above = i % 2 == 0
        sheet.line(x, y, x, y - 14 if above else y + 14, colour=colour, width=1)
        sheet.dot(x, y, colour=colour, hollow=hollow, radius=6)
        sheet.text(x, y - 18 if above else y + 28, f"{name} {number(value)}", colour=colour, anchor="middle", bold=not hollow)
    sheet.y = y + 48


def ablation_drawing(shown: AblationSteps, target: TargetSteps, names: Names, tokens: Sequence[str], *, title: str, subtitle: str) -> str:
    """How one live target of an ablated pass is computed, then what the output of the whole pass is. SVG text."""
    sheet = Sheet()
    sheet.head(title, subtitle)
    _sources_panel(sheet, target, names, tokens)
    _way_panel(sheet, target)
    _function_panel(sheet, target)
    _entries_panel(sheet, target, names)
    sheet.panel(
        "Keep one entry",
        "Of all that the encoder gave, the target keeps its own entry. The others are dropped: each live one has a private input of its own. "
        "This is what those who read the target will see.",
    )
    _number_line(sheet, [("baseline", target.baseline, BASE, True), ("clean run", target.clean, CLEAN, True), ("kept", target.value, ALIVE, False)])
    n = len({(one.site, one.node) for one in shown.targets if one.site != "y"})
    phi = shown.faithfulness
    sheet.panel(
        "All targets, then the output",
        f"So for each of the {n} live targets, site after site; dead nodes are at their baseline. The output reads what its own edges bring. "
        + ("φ is not defined: the baseline changes nothing." if phi is None else f"φ = (m(C) − m(∅)) / (m(M) − m(∅)) = {number(phi)}."),
    )
    marks = [("m(∅)", shown.metric_empty, BASE, True), ("m(M)", shown.metric_full, CLEAN, True), ("m(C)", shown.metric, ALIVE, False)]
    _number_line(sheet, marks)
    return sheet.svg()


def _sources_panel(sheet: Sheet, target: TargetSteps, names: Names, tokens: Sequence[str]) -> None:
    """The kept edges' sources, each on a line of its own."""
    n = len(target.sources)
    sheet.panel(
        "Take the circuit's edges into the target",
        f"The target: {called(target.site, target.node, names)}, at {token(tokens, target.position)}. The circuit's edges bring {n} "
        f"value{'s' * (n != 1)} that differ from the baseline, already ablated themselves. {target.n_cut:,} other nodes that it could read, and that "
        "the clean run moves, stay at theirs.",
    )
    shown = target.sources[:_SHOWN_SOURCES]
    values = [value for one in shown for value in (one.baseline, one.clean, one.alive)]
    scale = _Scale.over([*values, 0.0], 470, WIDTH - 90)
    for one in shown:
        y = sheet.y + 6
        sheet.text(INDENT, y + 4, f"{called(one.site, one.node, names, 30)}")
        sheet.text(450, y + 4, token(tokens, one.position), colour=SOFT, anchor="end", size=12)
        sheet.line(470, y, WIDTH - 90, y, width=1)
        sheet.line(scale(one.baseline), y, scale(one.alive), y, colour=ALIVE, width=3)
        sheet.dot(scale(one.baseline), y, colour=BASE, hollow=True, radius=4)
        sheet.dot(scale(one.clean), y, colour=CLEAN, hollow=True, radius=6)
        sheet.dot(scale(one.alive), y, colour=ALIVE, radius=4)
        sheet.text(WIDTH - 34, y + 4, number(one.alive), anchor="end", colour=ALIVE, bold=True)
        sheet.y += 24
    if n > len(shown):
        sheet.text(INDENT, sheet.y + 10, f"and {n - len(shown)} more", colour=SOFT)
        sheet.y += 20
    sheet.text(470, sheet.y + 12, "○ baseline", colour=BASE, size=12)
    sheet.text(550, sheet.y + 12, "○ clean run", colour=CLEAN, size=12)
    sheet.text(636, sheet.y + 12, "● what the target reads", colour=ALIVE, size=12)
    sheet.y += 34


def _way_panel(sheet: Sheet, target: TargetSteps) -> None:
    """How much of the way from the baseline to the clean value the private input goes."""
    sheet.panel(
        "Rebuild its private input",
        "x̃ = b_dec + Σ node · W_dec + error, every node at its baseline but those of the edges. Of the way from the baseline to the clean value, "
        f"this input goes {number(100 * target.way)} % at the target's position. No other target reads it.",
    )
    left, right, y = INDENT + 20, WIDTH - 90, sheet.y + 14
    span = right - left
    low, high = min(0.0, target.way), max(1.0, target.way)
    at = lambda share: left + (share - low) / (high - low) * span
    sheet.rect(at(0), y - 7, at(1) - at(0), 14, fill="#eef1f4", stroke=LINE)
    sheet.rect(min(at(0), at(target.way)), y - 7, abs(at(target.way) - at(0)), 14, fill=ALIVE)
    sheet.text(at(0), y + 26, "x of the baseline", colour=BASE, anchor="middle", size=12)
    sheet.text(at(1), y + 26, "x of the clean run", colour=CLEAN, anchor="middle", size=12)
    sheet.text(at(target.way), y - 13, f"{number(100 * target.way)} %", colour=ALIVE, anchor="middle", bold=True)
    sheet.y = y + 50


def _function_panel(sheet: Sheet, target: TargetSteps) -> None:
    """The local function as a row of boxes."""
    sheet.panel(
        "Run the whole local function on it",
        f"All that lies between what it reads and {target.site}, run on the private input: "
        "norms and attention patterns are recomputed, nothing is frozen.",
    )
    labels = ("x̃", "norm", "attention", "+", "norm", "MLP", "+", f"{target.site} of x̃")
    x, y = INDENT + 20.0, sheet.y
    for i, label in enumerate(labels):
        width = 34 if label == "+" else 26 + 7.5 * len(label)
        sheet.rect(x, y, width, 30, fill="#fff1e5" if i in (0, len(labels) - 1) else "#f6f8fa", stroke=LINE, radius=5)
        sheet.text(x + width / 2, y + 20, label, anchor="middle")
        if i < len(labels) - 1:
            sheet.line(x + width, y + 15, x + width + 16, y + 15, colour=SOFT)
        x += width + 16
    sheet.text(INDENT + 20, y + 50, "… for each block in between", colour=SOFT, size=12)
    sheet.y = y + 72


def _entries_panel(sheet: Sheet, target: TargetSteps, names: Names) -> None:
    """The largest entries of the encoded result, the target's own marked."""
    said = "the error node's entry is what the dictionary leaves of it" if target.node == ERROR else f"the target's own is {number(target.value)}"
    sheet.panel("Encode the result", f"The dictionary of {target.site} reads it: {target.n_entries:,} features are active in it, and {said}.")
    entries = list(target.top)
    if target.node != ERROR and target.node not in dict(entries):
        entries = [*entries[:11], (target.node, target.value)]
    height, top = 70.0, max((abs(value) for _, value in entries), default=1.0) or 1.0
    step = (WIDTH - 90 - INDENT - 20) / max(len(entries), 1)
    base = sheet.y + height
    for i, (index, value) in enumerate(entries):
        x, own = INDENT + 20 + i * step, index == target.node
        tall = abs(value) / top * height
        sheet.rect(x, base - tall, step * 0.62, tall, fill=ALIVE if own else "#d8dee4")
        sheet.text(x + step * 0.31, base + 14, str(index), anchor="middle", size=11, colour=ALIVE if own else SOFT, bold=own)
        sheet.text(x + step * 0.31, base - tall - 4, number(value, 2), anchor="middle", size=11, colour=ALIVE if own else SOFT)
    sheet.line(INDENT + 20, base, WIDTH - 90, base)
    sheet.y = base + 36


# --- attribution ------------------------------------------------------------------------------------------------------


def attribution_drawing(shown: AttributionSteps, names: Names, tokens: Sequence[str], *, title: str, subtitle: str, metric: str = "metric") -> str:
    """How one edge's weight comes about. SVG text."""
    sheet = Sheet()
    source, target = (called(*end[:2], names) for end in (shown.source, shown.target))
    sheet.head(title, subtitle)
    n, output = len(shown.steps), shown.target[0] == "y"
    sheet.panel(
        "Move all that d reads",
        f"u: {source}, at {token(tokens, shown.source[2])}. d: {target}, at {token(tokens, shown.target[2])}. What d reads goes from its baseline "
        f"to its clean value in {n} step{'s' * (n != 1)}: x(α) = x_base + α (x_clean − x_base), all parents and all positions together.",
    )
    left, right, y = INDENT + 20, WIDTH - 90, sheet.y + 12
    sheet.line(left, y, right, y, width=2)
    sheet.dot(left, y, colour=BASE, hollow=True)
    for step in shown.steps:
        sheet.dot(left + step.alpha * (right - left), y, colour=CLEAN if step.alpha == 1 else INK, radius=4)
    sheet.text(left, y + 24, "x_base", colour=BASE, anchor="middle", size=12)
    sheet.text(right, y + 24, "x_clean", colour=CLEAN, anchor="middle", size=12)
    sheet.y = y + 48
    if not output:
        said = "The local function of d's site runs on x(α), and its dictionary encodes the result. Only d's entry is used: f_d(α)."
        sheet.panel("Recompute d's site there", said)
        points = [(0.0, shown.value_start), *((step.alpha, step.value) for step in shown.steps)]
        _curve(sheet, points, "f_d(α)", ("clean run", shown.value_clean))
    sheet.panel(
        "Measure the output there" if output else "Put d alone into the clean run",
        f"The output is d itself: its {metric} at x(α)." if output
        else f"A run that is clean everywhere else, with f_d(α) at d: its {metric} is m(α). At α = 1 nothing is changed.",
    )  # fmt: skip
    _curve(sheet, [(0.0, shown.metric_start), *((step.alpha, step.metric) for step in shown.steps)], "m(α)", ("clean run", shown.metric_clean))
    sheet.panel(
        "Follow the gradient from u through d",
        "At each step, ∂m/∂f_d at f_d(α) times ∂f_d/∂u at x(α): what the metric gains through d alone for each unit of u. "
        "Where d is inactive it is 0.",
    )
    _slopes(sheet, shown)
    whole = shown.metric_clean - shown.metric_start
    sheet.panel(
        "Times what u changes",
        f"Mean slope {number(shown.mean_slope)} × (clean {number(shown.clean)} − baseline {number(shown.baseline)}) = {number(shown.effect)}: the "
        f"weight of the edge, in the units of the {metric}. The edges of all nodes that d reads, at every position, add up to "
        f"{number(shown.total)}; d's whole way, m(clean) − m(d recomputed from x_base), is {number(whole)}. With more steps "
        "the two come together, up to jumps of d (where a TopK or JumpReLU feature comes on), which no gradient sees.",
    )
    marks = [("no effect", 0.0, BASE, True), ("all edges into d", shown.total, INK, True), ("d's whole way", whole, CLEAN, True)]
    _number_line(sheet, [*marks, ("this edge", shown.effect, ALIVE, False)])
    return sheet.svg()


def _curve(sheet: Sheet, points: Sequence[tuple[float, float]], name: str, reference: tuple[str, float]) -> None:
    """Values against α, (α, value), with a dashed line at a reference."""
    left, right, height = INDENT + 60, WIDTH - 190, 90.0
    scale = _Scale.over([*(value for _, value in points), reference[1]], sheet.y + height, sheet.y)
    x = lambda alpha: left + alpha * (right - left)
    sheet.line(left, scale(scale.low), left, scale(scale.high), colour=LINE)
    sheet.line(left, scale(reference[1]), right, scale(reference[1]), colour=CLEAN, dashed=True)
    sheet.text(right + 10, scale(reference[1]) + 4, f"{reference[0]} {number(reference[1])}", colour=CLEAN, size=12)
    sheet.path([(x(alpha), scale(value)) for alpha, value in points], colour=ALIVE)
    for alpha, value in points:
        sheet.dot(x(alpha), scale(value), colour=BASE if alpha == 0 else ALIVE, hollow=alpha == 0, radius=4)
    sheet.text(left - 8, scale(points[0][1]) + 4, number(points[0][1]), anchor="end", size=12, colour=BASE)
    sheet.text(left - 8, sheet.y - 2, name, anchor="end", size=12, colour=SOFT)
    for alpha in (0, 0.5, 1):
        sheet.text(x(alpha), sheet.y + height + 18, f"α = {alpha:g}", anchor="middle", size=11, colour=SOFT)
    sheet.y += height + 42


def _slopes(sheet: Sheet, shown: AttributionSteps) -> None:
    """The product of both slopes at each step, and its mean."""
    left, right, height = INDENT + 60, WIDTH - 190, 80.0
    scale = _Scale.over([0.0, shown.mean_slope, *(step.slope for step in shown.steps)], sheet.y + height, sheet.y)
    width = (right - left) / len(shown.steps)
    for i, step in enumerate(shown.steps):
        y0, y1 = scale(0.0), scale(step.slope)
        sheet.rect(left + i * width + 0.15 * width, min(y0, y1), 0.7 * width, abs(y1 - y0), fill="#f0b88a")
        if len(shown.steps) <= 12:
            both = f"{number(step.slope_metric, 2)} × {number(step.slope_local, 2)}"
            sheet.text(left + (i + 0.5) * width, sheet.y + height + 16, both, anchor="middle", size=9, colour=SOFT)
    sheet.line(left, scale(0.0), right, scale(0.0))
    sheet.line(left, scale(shown.mean_slope), right, scale(shown.mean_slope), colour=ALIVE, width=2, dashed=True)
    sheet.text(right + 10, scale(shown.mean_slope) + 4, f"mean {number(shown.mean_slope)}", colour=ALIVE, bold=True)
    sheet.y += height + 40
