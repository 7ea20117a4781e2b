"""Real programs that tests talk to: a Neo4j server of their own, and Neo4j Browser in a real Chromium."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import neo4j
from featlas.queries.neo4j_server import ServerInfo, ServerOptions, down, up

from .chromium import CHROMIUM

# any free ports, little memory, a quick stop: about 320 MB and 5 s to start on a quiet machine
THROWAWAY = ServerOptions(bolt_port=0, http_port=0, heap_mb=512, pagecache_mb=128, throwaway=True, start_limit_s=300)
WIPE = "MATCH (n) CALL (n) { DETACH DELETE n } IN TRANSACTIONS OF 5000 ROWS"


@dataclass(frozen=True)
class Neo4jTestServer:
    """A running Neo4j that a test may fill and wipe; `uri`, `username`, `password` are what a user would be given."""

    info: ServerInfo
    home: Path
    driver: neo4j.Driver

    @property
    def uri(self) -> str:
        return self.info.uri

    @property
    def username(self) -> str:
        return self.info.username

    @property
    def password(self) -> str:
        return self.info.password

    def run(self, cypher: str, **parameters: object) -> list[dict[str, object]]:
        """The rows of one statement, by the official driver: a way to look at the database around the code under test."""
        with self.driver.session(database="neo4j") as session:
            return session.run(cypher, parameters).data()

    def wipe(self) -> None:
        """Delete every node and relationship, in batches (one large transaction outgrows the small heap); constraints stay."""
        self.run(WIPE)


def start_server(home: Path) -> Neo4jTestServer:
    info = up(home, THROWAWAY)
    driver = neo4j.GraphDatabase.driver(info.uri, auth=(info.username, info.password))
    driver.verify_connectivity()
    return Neo4jTestServer(info, home, driver)


def stop_server(server: Neo4jTestServer) -> None:
    server.driver.close()
    down(server.home)


def browser_screenshot(server: Neo4jTestServer, cypher: str, path: Path, *, wait_s: float = 60.0) -> int:
    """Log in to the real Neo4j Browser, run `cypher`, store a picture at `path`; returns how many nodes are drawn.

    Raises playwright's TimeoutError when no graph is drawn within `wait_s` seconds; the picture is then of what there was instead.
    """
    from playwright.sync_api import sync_playwright

    query = urlencode({"dbms": server.uri, "db": "neo4j", "cmd": "edit", "arg": cypher})
    limit_ms = wait_s * 1000
    with sync_playwright() as playwright:
        # Chromium's sandbox does not start for root, and the page is our own server's
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        try:
            page.goto(f"{server.info.http_url}/browser/?{query}", timeout=limit_ms)
            page.fill("[data-testid=username]", server.username, timeout=limit_ms)
            page.fill("[data-testid=password]", server.password)
            page.click("[data-testid=connect]")
            page.wait_for_selector("[data-testid=password]", state="detached", timeout=limit_ms)
            page.click(".monaco-editor", timeout=limit_ms)
            page.keyboard.press("Control+Enter")
            page.wait_for_selector("svg g.node", timeout=limit_ms)
            page.wait_for_timeout(3000)  # the layout settles
            return page.locator("svg g.node").count()
        finally:
            page.screenshot(path=path)
            browser.close()
