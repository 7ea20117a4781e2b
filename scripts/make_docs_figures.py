"""The documentation's figures, from a real run: SmolLM2, its demo dictionaries and the analyses on them, about half an hour on two cores.

    python -m scripts.make_docs_figures WORK [--only drawings,circuit,…]

WORK is a folder for the atlas and the pages that the commands write (what is there already is kept). Each figure is one plotly figure of a page,
saved as SVG by the page's own plotly.js in Chromium, or a screenshot.
"""

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
WIDTH = 1000


@dataclass(frozen=True)
class Figure:
    """One file: which page's figure (the id of its element, or the place of it among the page's), how high; `command` makes the page."""

    name: str
    page: str
    command: str
    place: int = 0
    height: int | None = None
    screenshot: bool = False


MEASURE = (
    "demo --output demo.html",
    "ingest samples --task agreement+pronoun+ioi --limit 120",
    "analyze rois",
    "analyze circuit --edges 200",
    "analyze faithfulness --task agreement --shares 0.01,0.05,0.2,1 --held-out 6 --control-draws 1",
)
"""What the figures' atlas is made by, in order."""

FIGURES_OF = (
    Figure("faithfulness", "plot.html", "plot --task agreement --output plot.html"),
    Figure("communities", "communities.html", "analyze communities --no-scan --seeds 2 --nulls 3 --held-out 4 --largest 4 --control-draws 1 "
           "--no-write --gallery communities.html", place=1),
    Figure("vision", "vision.html", "analyze vision --gallery vision.html", place=1),
    Figure("regions", "rois.html", "analyze rois --sites resid_11 --nulls 3 --gallery rois.html"),
    Figure("ablate-rois", "ablate.html", "analyze ablate-rois --held-out 3 --blocks 6 --drives 6 --random-draws 1 --shares 0.05,0.2,0.5,1 "
           "--edge-shares 0.3 --no-write --gallery ablate.html", place=1),
    Figure("heads", "heads.html", "analyze heads --site resid_11 --limit 8 --parcellation latest --gallery heads.html"),
    Figure("effects", "effects.html", "analyze effects --edges 60 --held-out 4 --gallery effects.html"),
    Figure("agreement", "agreement.html", "analyze agreement --plot agreement.html"),
    Figure("compare", "comparison.html", "compare --task agreement --other-task ioi --plot comparison.html"),
    Figure("series", "series.html", "demo --series --atlas series-atlas --output series.html"),
    Figure("matching", "matching.html", "analyze match --atlas series-atlas --gallery matching.html"),
    Figure("report", "report.html", "report --output report.html", screenshot=True),
)  # fmt: skip
DRAWINGS = (
    "explain ablation --task agreement --edges 60 --output ablation.svg",
    "explain attribution resid_17/696 resid_23/1151 --task agreement --steps 10 --output attribution.svg",
)


def featlas(work: Path, command: str) -> None:
    """One command in the folder, on its atlas where it takes one."""
    words = [sys.executable, "-m", "featlas.cli", *command.split()]
    if "vision" not in words and "--atlas" not in words:
        words += ["--atlas", "atlas"]
    print("featlas", command, flush=True)
    subprocess.run(words, cwd=work, check=True)


def drawings(work: Path) -> None:
    """The step-by-step drawings, which are SVG already."""
    for command in DRAWINGS:
        featlas(work, command)
        name = command.split()[-1]
        (FIGURES / name).write_text((work / name).read_text(encoding="utf-8"), encoding="utf-8")


def circuit(work: Path) -> None:
    """The circuit of one task, drawn from the atlas."""
    from featlas.atlas import Atlas

    atlas = Atlas(work / "atlas")
    run = atlas.run(atlas.runs["run"][0])
    figure = run.circuit(edges=120, task="agreement").figure(max_edges=90)
    figure.write_html(work / "circuit.html", include_plotlyjs=True)
    save(work, [Figure("circuit", "circuit.html", "")])


def save(work: Path, figures: list[Figure]) -> None:
    """Each figure of a page as a file of `FIGURES`."""
    from playwright.sync_api import sync_playwright

    from tests.chromium import CHROMIUM

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for one in figures:
            page = browser.new_page(viewport={"width": WIDTH, "height": 760})
            page.goto((work / one.page).as_uri())
            page.wait_for_timeout(3000)
            if one.screenshot:
                page.screenshot(path=FIGURES / f"{one.name}.png")
            else:
                svg = page.evaluate(
                    """async ([place, width, height]) => {
                        const drawn = document.querySelectorAll(".js-plotly-plot")[place];
                        const url = await Plotly.toImage(drawn, {format: "svg", width, height: height || drawn._fullLayout.height});
                        return decodeURIComponent(url.slice(url.indexOf(",") + 1));
                    }""",
                    [one.place, WIDTH, one.height],
                )
                (FIGURES / f"{one.name}.svg").write_text(svg, encoding="utf-8")
            page.close()
        browser.close()


def main() -> None:
    """Make the atlas and the pages that are missing, then the figures asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    work, only = given.work.resolve(), set(filter(None, given.only.split(",")))
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "atlas").exists():
        for command in MEASURE:
            featlas(work, command)
    if not only or "drawings" in only:
        drawings(work)
    if not only or "circuit" in only:
        circuit(work)
    wanted = [one for one in FIGURES_OF if not only or one.name in only]
    for one in wanted:
        if not (work / one.page).exists():
            featlas(work, one.command)
    save(work, wanted)


if __name__ == "__main__":
    main()
