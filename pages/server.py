"""The page alive over an atlas: `featlas serve`.

Who may ask is decided before anything else, for every request:

1. The server listens on loopback addresses alone, and answers only to their names: a page of the web that has its own name
   point here (DNS rebinding) is refused by the Host header.
2. A request that another page's script or form sends is refused by Origin and Sec-Fetch-Site; no header lets another origin read.
3. Everything needs the token of the address that was printed: as ?token=…, which sets a cookie that scripts cannot read, or as
   `Authorization: Bearer …` for programs. Tokens are compared in constant time.

Then: pages by their names (`GET api/NAME?…`, see `payload.PAGES`), named queries and what their parameters may be (`GET api/queries`), and
queries (`POST api/query`), which the databases run as reading, within limits of rows and of time. Errors are `{"error": message}`, the
message being the database's own where it refused a query.
"""

import asyncio
import ipaddress
import logging
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any
from urllib.parse import parse_qsl

import uvicorn

# nnsight, which the pages import, gives every object a `save`; this class takes that for an attribute without annotation unless it is made before.
from anyio.abc import SocketAttribute  # noqa: F401
from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import FeatlasError, UserError
from ..queries.library import NamedQuery, bound_query, list_queries, parameter_choices
from ..queries.schema import EDGES, NODES
from ..queries.store import QueryLimits, WriteRefused
from .answers import answer_page
from .payload import PAGES, UnknownPage, answer
from .reader import AtlasReader

log = logging.getLogger(__name__)

DEFAULT_PORT = 8765
PORTS_TRIED = 20
LONGEST_S, MOST_ROWS = 300.0, 10_000
LARGEST_REQUEST = 2**20  # bytes
LARGEST_ANSWER = 64 * 2**20
QUERIES_AT_ONCE = 4


class NotLoopback(UserError):
    """The server was to listen where others could reach it."""


class PortTaken(UserError):
    """Something else listens on the port."""


class TooManyQueries(FeatlasError):
    """As many queries run as may run at a time."""


class AnswerTooLarge(UserError):
    """An answer is larger than a browser should be sent."""


@dataclass(frozen=True)
class ServeOptions:
    """What a query may take unless it asks for less: `rows` that are shown, `seconds` that it runs."""

    rows: int = 1_000
    seconds: float = 30.0


class QueryRequest(BaseModel):
    """A query of one's own (`cypher`) or a named one (`name`), with its parameters and how much it may take."""

    model_config = ConfigDict(extra="forbid")

    cypher: str | None = None
    name: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    rows: int | None = Field(None, ge=1, le=MOST_ROWS)
    seconds: float | None = Field(None, gt=0, le=LONGEST_S)


# --- the application --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """The page itself: its HTML, and its scripts by the names under which it asks for them."""

    html: str
    scripts: Mapping[str, str]


def make_app(reader: AtlasReader, token: str, page: Served, options: ServeOptions | None = None) -> "Guard":
    """The application over an atlas; `token` is what every request must know."""
    app = FastAPI(title="featlas", docs_url=None, redoc_url=None, openapi_url=None)
    _errors(app)
    running = threading.BoundedSemaphore(QUERIES_AT_ONCE)
    within = options or ServeOptions()

    @app.get("/")
    def root() -> HTMLResponse:
        return HTMLResponse(page.html, headers={"content-security-policy": CONTENT_SECURITY_POLICY})

    @app.get("/scripts/{name}")
    def script(name: str) -> Response:
        if name not in page.scripts:
            raise HTTPException(404)
        # the page asks for each script with a mark of what it holds
        return Response(page.scripts[name], media_type="text/javascript", headers={"cache-control": "private, max-age=86400, immutable"})

    @app.get("/api/queries")
    def queries() -> Response:
        with reader.graph() as store:
            choices = parameter_choices(store)
        named = [_query_page(query, reader.dialect) for query in list_queries()]
        limits = {"rows": within.rows, "seconds": within.seconds, "most_rows": MOST_ROWS, "longest_s": LONGEST_S}
        return _json({"dialect": reader.dialect, "queries": named, "choices": choices, "schema": schema_page(), "limits": limits})

    @app.post("/api/query")
    def query(asked: Annotated[QueryRequest, Body()]) -> Response:
        with _one_of(running):
            return _json(run(reader, asked, within), inf_nan="strings")

    @app.get("/api/{name}")
    def page_by_name(name: str, request: Request) -> Response:
        if name not in PAGES:
            raise UnknownPage(f"no page {name!r}: there are {', '.join(PAGES)}, queries and query")
        with reader.source() as source:
            return _json(answer(source, name, dict(request.query_params)))

    return Guard(app, token)


def run(reader: AtlasReader, asked: QueryRequest, options: ServeOptions) -> dict[str, object]:
    """The answer to a query, with the `ms` that it took, its `cypher` and the `parameters` that were sent.

    Raises `UserError` where neither or both of `cypher` and `name` are given, and what the store raises.
    """
    if (asked.cypher is None) == (asked.name is None):
        raise UserError("give the text of a query (cypher) or the name of a named one (name), one of the two")
    limits = QueryLimits(asked.rows or options.rows, asked.seconds or options.seconds)
    with reader.graph() as store:
        bound = None if asked.name is None else bound_query(store, asked.name, asked.parameters)
        cypher, parameters = (str(asked.cypher), asked.parameters) if bound is None else (bound.text, dict(bound.values))
        began = time.perf_counter()
        found = store.answer(cypher, parameters, limits=limits)
        ms = 1000 * (time.perf_counter() - began)
        page = answer_page(store, found)
    return {**page, "ms": round(ms, 2), "limit": limits.rows, "cypher": cypher, "parameters": parameters}


def schema_page() -> dict[str, object]:
    """The labels and types of the graph with their properties: what an editor completes."""
    nodes = {label.name: list(label.all_columns) for label in NODES.values() if label.name != "Meta"}
    edges = {edge.name: {"ends": [list(ends) for ends in edge.ends], "properties": list(edge.properties)} for edge in EDGES.values()}
    return {"nodes": nodes, "edges": edges}


def _query_page(query: NamedQuery, dialect: str) -> dict[str, object]:
    parameters = [
        {"name": parameter.name, "kind": parameter.kind.value, "required": parameter.required, "default": parameter.default, "doc": parameter.doc}
        for parameter in query.parameters
    ]
    return {"name": query.name, "doc": query.doc, "parameters": parameters, "cypher": query.text_for(dialect)}


@contextmanager
def _one_of(running: threading.BoundedSemaphore) -> Iterator[None]:
    if not running.acquire(timeout=5):
        raise TooManyQueries(f"{QUERIES_AT_ONCE} queries are running already: wait until one is done")
    try:
        yield
    finally:
        running.release()


def _json(value: object, inf_nan: Any = "null") -> Response:
    """JSON that a browser reads: numbers that are not finite are null, or text where a reader is to see them. Raises `AnswerTooLarge`."""
    content = to_json(value, inf_nan_mode=inf_nan, fallback=str)
    if len(content) > LARGEST_ANSWER:
        has, most = len(content) >> 20, LARGEST_ANSWER >> 20
        raise AnswerTooLarge(f"the answer has {has} MB, more than the {most} MB that a page is sent: ask for less")
    return Response(content, media_type="application/json")


def _errors(app: FastAPI) -> None:
    """Mistakes are answered with 400, failures with 503, each as one message; what nobody expected with 500, its traceback in the log."""

    @app.exception_handler(UserError)
    def mistake(_: Request, error: Exception) -> JSONResponse:
        # no request may write: the option that the message names is the command's
        said = f"the query was refused: {error.reason}. This page only reads" if isinstance(error, WriteRefused) else str(error)
        return JSONResponse({"error": said, "kind": type(error).__name__}, 404 if isinstance(error, UnknownPage) else 400)

    @app.exception_handler(FeatlasError)
    def failure(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": str(error), "kind": type(error).__name__}, 503)

    @app.exception_handler(RequestValidationError)
    def malformed(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        told = "; ".join(f"{'.'.join(str(part) for part in one['loc'] if part != 'body') or 'body'}: {one['msg']}" for one in error.errors())
        return JSONResponse({"error": told, "kind": "BadRequest"}, 400)

    @app.exception_handler(HTTPException)
    def absent(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        told = f"{request.method} {request.url.path}: {error.detail.lower()}"
        return JSONResponse({"error": told, "kind": "NotFound"}, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    def unexpected(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": f"featlas failed at {request.url.path}: {type(error).__name__}; the terminal has more", "kind": "Bug"}, 500)


# --- who may ask ------------------------------------------------------------------------------------------------------


@dataclass
class Guard:
    """Refuses requests that were not meant for this server, or do not know its token, and sets the headers of every answer."""

    app: ASGIApp
    token: str = field(repr=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = foreign(headers) or _oversized(scope["method"], headers)
        by_address = self._knows(dict(parse_qsl(scope["query_string"].decode("latin-1"))).get("token"))
        cookie = f"featlas-{headers.get('host', '').rpartition(':')[2]}"  # a host's ports share their cookies: each has its own name
        if refusal is None and not (by_address or self._knows(_bearer(headers)) or self._knows(_cookies(headers).get(cookie))):
            refusal = 401, "this needs the token of the address that `featlas serve` printed: open that address"

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {name for name, _ in message["headers"]}
                message["headers"] += [(name, value) for name, value in _HEADERS if name not in own]
                if by_address and refusal is None:
                    set_cookie = f"{cookie}={self.token}; HttpOnly; SameSite=Strict; Path=/"
                    message["headers"].append((b"set-cookie", set_cookie.encode("latin-1")))
            await send(message)

        if refusal is not None:
            await _refuse(scope, refusal)(scope, receive, answer)
        else:
            await self.app(scope, receive, answer)

    def _knows(self, given: str | None) -> bool:
        return given is not None and secrets.compare_digest(given.encode(), self.token.encode())


def foreign(headers: dict[str, str]) -> tuple[int, str] | None:
    """Why a request is none of this server's pages', as (status, reason): by the name it was sent to, or by the page that sent it."""
    host, origin, site = headers.get("host", ""), headers.get("origin"), headers.get("sec-fetch-site", "none")
    if not _HOST.fullmatch(host) or not _is_loopback(_HOST.sub(r"\1", host).strip("[]")):
        return 421, f"this server answers to localhost and 127.0.0.1 alone, not to {host!r}"
    # a link that was clicked on another page may open the page itself, with the token
    clicked = headers.get("sec-fetch-mode") == "navigate" and origin is None
    if origin not in (None, f"http://{host}") or not (site in ("same-origin", "none") or clicked):
        return 403, "this server answers to its own page alone, not to those of other origins"
    return None


_HOST = re.compile(r"([\w.-]+|\[[\da-fA-F:.]+\])(?::\d{1,5})?", re.ASCII)


def _oversized(method: str, headers: dict[str, str]) -> tuple[int, str] | None:
    if method in ("GET", "HEAD"):
        return None
    length = headers.get("content-length", "")
    if not length.isdigit():
        return 411, "a request with a body must say its length"
    return (413, f"a request may have {LARGEST_REQUEST:,} bytes") if int(length) > LARGEST_REQUEST else None


def _bearer(headers: dict[str, str]) -> str | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def _cookies(headers: dict[str, str]) -> dict[str, str]:
    return dict(part.strip().split("=", 1) for part in headers.get("cookie", "").split(";") if "=" in part)


def _refuse(scope: Scope, refusal: tuple[int, str]) -> Response:
    status, reason = refusal
    if scope["path"].startswith("/api/"):
        return JSONResponse({"error": reason, "kind": "Refused"}, status)
    return Response(f"featlas: {reason}\n", status, media_type="text/plain")


CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What the page may do: run the scripts of this server, ask it, nothing else."""


_HEADERS = tuple(
    (name.encode(), value.encode())
    for name, value in {
        "x-content-type-options": "nosniff", "x-frame-options": "DENY", "referrer-policy": "no-referrer", "cache-control": "no-store",
        "cross-origin-opener-policy": "same-origin", "cross-origin-resource-policy": "same-origin",
        "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    }.items()
)  # fmt: skip


# --- listening --------------------------------------------------------------------------------------------------------


def listen(host: str, port: int | None) -> socket.socket:
    """A socket on a loopback address. Port None is the default port or the next free one, 0 any free one.

    Raises `NotLoopback`, `PortTaken`.
    """
    if not _is_loopback(host):
        raise NotLoopback(
            f"--host {host!r} is not this machine alone: featlas serve listens on 127.0.0.1, localhost or ::1. From another machine, "
            f"use a tunnel: ssh -L {port or DEFAULT_PORT}:127.0.0.1:{port or DEFAULT_PORT} THIS-MACHINE"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    ports = range(DEFAULT_PORT, DEFAULT_PORT + PORTS_TRIED) if port is None else [port]
    for wanted in ports:
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((host, wanted))
            bound.listen()  # until then another process may bind the same port
        except OSError as error:
            bound.close()
            log.debug("port %d: %s", wanted, error)
        else:
            return bound
    taken = f"port {ports[0]} of {host} is" if len(ports) == 1 else f"ports {ports[0]} to {ports[-1]} of {host} are"
    raise PortTaken(f"{taken} taken or not allowed: name another with --port, or --port 0 for any free one")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def address_of(bound: socket.socket, token: str) -> str:
    """The address to open: with the token in it."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/?token={token}"


def serve(app: Guard, bound: socket.socket) -> None:
    """Answer requests until interrupted (Ctrl-C, SIGTERM). The address, which holds the token, is not logged."""
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=2, lifespan="off")
    logging.getLogger("uvicorn.error").addFilter(_unless_cut_off)
    uvicorn.Server(config).run(sockets=[bound])


def _unless_cut_off(record: logging.LogRecord) -> bool:
    """Whether a line of the log says more than that a request was cut off by the end of the server."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, asyncio.CancelledError) and "graceful shutdown exceeded" not in record.getMessage()
