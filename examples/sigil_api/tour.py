"""A guided tour: a real server, some twenty real requests, what was asked and what came back.

    python -m examples.sigil_api tour

Every stop says what it expects. The exit status is 0 only if everything was as it should be.
"""

import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from examples.sigil_api.home import Home

_CHECKOUT = Path(__file__).resolve().parents[2]
_START_WITHIN = 60.0
_SECRET = re.compile(r"(?<=access_token=.{14})[^&]+")


class Server:
    """`serve` in a process of its own: where it listens, and every line it has written."""

    def __init__(self, home: Home, *options: str) -> None:
        self.lines: list[str] = []
        self._listening = threading.Event()
        self._process = subprocess.Popen(  # noqa: S603  our own command
            [sys.executable, "-m", "examples.sigil_api", "serve", "--port", "0", "--home", str(home.folder), *options],
            cwd=_CHECKOUT,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self.lines.append(line.rstrip("\n"))
            if line.startswith("One JSON line"):  # the end of the greeting
                self._listening.set()
        self._listening.set()

    def url(self) -> str:
        """Where it listens, once it does."""
        self._listening.wait(_START_WITHIN)
        for line in self.lines:
            if line.startswith("The Sigil API listens on "):
                return line.split()[5]
        raise RuntimeError(f"the server did not start within {_START_WITHIN:.0f} seconds")

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines if line.startswith("{")]

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(30)
        if self._process.stdout is not None:
            self._process.stdout.close()


class Guide:
    """Asks, shows, and remembers what was off."""

    def __init__(self, client: httpx2.Client) -> None:
        self._client = client
        self.stops = 0
        self.off: list[str] = []

    def ask(
        self,
        why: str,
        request: str,
        *,
        expect: int,
        token: str | None = None,
        key: str | None = None,
        body: Any = None,
        headers: dict[str, str] | None = None,
        show: tuple[str, ...] = (),
        again: int = 0,
    ) -> httpx2.Response:
        """Send `request` ("GET /path"): `expect` is the status it should get, `show` names headers worth seeing.

        While it is another one, it is sent `again`, so many times.
        """
        method, path = request.split(" ", 1)
        sent = dict(headers or {})
        if token is not None:
            sent["Authorization"] = f"Bearer {token}"
        if key is not None:
            sent["X-API-Key"] = key
        response = self._client.request(method, path, json=body, headers=sent)
        for _ in range(again):
            if response.status_code != expect:
                response = self._client.request(method, path, json=body, headers=sent)

        self.stops += 1
        print(f"\n{self.stops:2}. {why}\n    {_SECRET.sub('...', request)}")
        for name, value in sent.items():
            shown = f"{value[:14]}..." if name in ("Authorization", "X-API-Key") else value
            print(f"      {name}: {shown}")
        if body is not None:
            print(f"      {_short(json.dumps(body))}")
        print(f"    -> {response.status_code} {response.reason_phrase}")
        for name in show:
            print(f"      {name}: {response.headers.get(name, '(missing)')}")
        if response.content:
            print(f"      {_short(response.text)}")
        self.check(f"the status is {expect}", response.status_code == expect)
        for name in show:
            self.check(f"there is a header {name}", name in response.headers)
        return response

    def peek(self, path: str, token: str) -> Any:
        """What is there, without a word about it."""
        return self._client.get(path, headers={"Authorization": f"Bearer {token}"}).json()

    def check(self, what: str, holds: bool) -> None:
        if not holds:
            print(f"    OFF: expected that {what}")
            self.off.append(f"stop {self.stops}: {what}")


def tour(home: Home | None = None) -> int:
    """0 if all was well, 1 if anything was off."""
    with _home(home) as place:
        server = Server(place)
        try:
            with httpx2.Client(base_url=server.url(), timeout=60, trust_env=False) as client:
                guide = Guide(client)
                secrets = _walk(guide, place)
            time.sleep(0.2)
        finally:
            server.stop()
        _read_log(guide, server, secrets)
    if guide.off:
        print(f"\n{len(guide.off)} of what was expected did not hold:", *guide.off, sep="\n  ")
        return 1
    print(f"\nAll {guide.stops} stops were as they should be.")
    return 0


def _walk(guide: Guide, home: Home) -> list[str]:
    """All stops; returns what must not be found in the log."""
    scopes = ["agents:read", "agents:write", "agents:execute", "memory:read", "memory:write"]
    scopes += ["evolution:read", "evolution:write"]
    token = home.mint_token(subject="ada", tier="pro", scopes=scopes)
    reader = home.mint_token(subject="rita", tier="pro", scopes=["agents:read"])
    expired = home.mint_token(subject="ada", tier="pro", scopes=scopes, lifetime=-3600)
    hurried = home.mint_token(subject="hugo", tier="free", scopes=["agents:read"])
    ask, check = guide.ask, guide.check

    # Who may come in
    response = ask(
        "Health is public, and never cached.", "GET /health", expect=200, show=("Cache-Control", "X-Request-ID")
    )
    check("nobody may cache it", response.headers.get("cache-control") == "no-cache")

    response = ask("Everything else wants to know who calls.", "GET /v7/agents", expect=401, show=("WWW-Authenticate",))
    check("the problem says so", _code(response) == "AUTH_001")
    check("it is a problem (RFC 9457)", response.headers["content-type"] == "application/problem+json")

    response = ask(
        "A token that is none.",
        "GET /v7/agents",
        token="not.a.token",  # noqa: S106
        expect=401,
        show=("WWW-Authenticate",),
    )
    check("the challenge says invalid_token", 'error="invalid_token"' in response.headers.get("www-authenticate", ""))

    response = ask("A token of yesterday.", "GET /v7/agents", token=expired, expect=401, show=("WWW-Authenticate",))
    check("the challenge says invalid_token", 'error="invalid_token"' in response.headers.get("www-authenticate", ""))

    response = ask(
        "A token in the query would end up in logs everywhere.",
        f"GET /v7/agents?access_token={token}",
        expect=400,
    )
    check("the problem says so", _code(response) == "AUTH_007")

    new = {"name": "sales_qualifier", "stratum": "RAI", "description": "Qualifies sales leads"}
    response = ask(
        "Reading is granted, writing is not.",
        "POST /v7/agents",
        token=reader,
        body=new,
        expect=403,
        show=("WWW-Authenticate",),
    )
    check("the challenge names the scope", 'scope="agents:write"' in response.headers.get("www-authenticate", ""))

    # What is asked for
    response = ask(
        "Names and strata are validated; what was rejected is not repeated.",
        "POST /v7/agents",
        token=token,
        body={"name": "x", "stratum": "<script>", "description": ""},
        expect=400,
    )
    errors = {error["field"]: error["message"] for error in response.json().get("validation_errors", [])}
    check("the name is explained", errors.get("name") == "Agent name must be 3-64 characters")
    check("the stratum is explained", errors.get("stratum", "").startswith("Invalid stratum, must be one of: RTI"))
    check("the input is not echoed", "script" not in response.text)

    response = ask("A good one is created.", "POST /v7/agents", token=token, body=new, expect=201, show=("Location",))
    check("the location is its own", response.headers.get("location") == "/v7/agents/sales_qualifier")
    check("it starts at 1.0.0", response.json().get("version") == "1.0.0")

    response = ask("Twice is a conflict.", "POST /v7/agents", token=token, body=new, expect=409)
    check("the problem says so", _code(response) == "AGT_002")

    response = ask("Nobody of that name.", "GET /v7/agents/nobody_here", token=token, expect=404)
    check("the problem says so", _code(response) == "AGT_001")

    # What need not be sent again
    path = "/v7/agents/sales_qualifier"
    response = ask(
        "An agent comes with a tag and with how long it may be kept.",
        f"GET {path}",
        token=token,
        expect=200,
        show=("ETag", "Last-Modified", "Cache-Control"),
    )
    tag = response.headers.get("etag", "")
    response = ask(
        "Who has it already gets nothing but a yes.",
        f"GET {path}",
        token=token,
        expect=304,
        headers={"If-None-Match": tag},
        show=("ETag",),
    )
    check("there is no body", response.content == b"")
    response = ask("A change makes a new version.", f"PATCH {path}", token=token, body={"stratum": "EEI"}, expect=200)
    check("the version went up", response.json().get("version") == "1.0.1")
    response = ask(
        "So the old tag no longer matches.",
        f"GET {path}",
        token=token,
        expect=200,
        headers={"If-None-Match": tag},
        show=("ETag",),
    )
    check("the tag is another", response.headers.get("etag") != tag)

    ask("And a second agent, to have two.", "POST /v7/agents", token=token, expect=201, body={**new, "name": "greeter"})
    response = ask(
        "Lists are filtered, sorted and paged; Link names the other pages.",
        "GET /v7/agents?sort=-created_at,name&per_page=1",
        token=token,
        expect=200,
        show=("Link", "ETag"),
    )
    check("there are two", response.json().get("pagination", {}).get("total") == 2)
    check("the newest is first", [agent["name"] for agent in response.json().get("agents", [])] == ["greeter"])
    check("the next page is named", 'page=2>; rel="next"' in response.headers.get("link", ""))

    # What is going away
    response = ask(
        "The previous version still answers, and says until when.",
        "GET /v6/agents",
        token=token,
        expect=200,
        show=("Deprecation", "Sunset", "Link"),
    )
    check("its successor is named", '</v7/agents>; rel="successor-version"' in response.headers.get("link", ""))

    # What it costs; budgets begin anew with the minute, so the three stops must fall into the same one.
    if time.time() % 60 > 50:
        time.sleep(60 - time.time() % 60)
    question = {"input": "Qualify this lead: John from Acme, budget 50,000"}
    response = ask(
        "A run is paid for in tokens.",
        f"POST {path}/run",
        token=token,
        body=question,
        expect=200,
        show=("X-Tokens-Used", "X-Tokens-Remaining", "X-RateLimit-Remaining", "RateLimit"),
    )
    used = response.json()["metadata"]["tokens_used"]["total_tokens"]
    check("header and body agree", response.headers.get("x-tokens-used") == str(used) and used > 0)

    response = ask(
        "The same, as server-sent events.",
        f"POST {path}/run",
        token=token,
        body={**question, "stream": True},
        expect=200,
        show=("Content-Type",),
    )
    check("it came token by token", response.text.count("event: token") > 20)
    check("it told what it used", '"total_tokens"' in response.text.rsplit("event: complete", 1)[-1])

    response = ask("What is left of the budget.", "GET /v7/budget/status", token=token, expect=200)
    budget = response.json()
    check("both runs are counted", budget["tokens"][0]["used"] >= 2 * used)
    check(
        "the utilization is theirs", budget["utilization"] == budget["tokens"][0]["used"] / budget["tokens"][0]["limit"]
    )

    # What is remembered, what is improved
    note = {"content": "Acme signed in March", "agent_name": "sales_qualifier"}
    ask("Something to remember.", "POST /v7/memory", token=token, body=note, expect=201, show=("Location",))
    response = ask(
        "It is found by its words.",
        "POST /v7/memory/search",
        token=token,
        body={"query": "When did Acme sign?"},
        expect=200,
        show=("Cache-Control",),
    )
    check("it is the one", [found["content"] for found in response.json().get("results", [])] == [note["content"]])

    response = ask(
        "Improving takes a while: accepted.",
        "POST /v7/evolution/optimize",
        token=token,
        body={"agent_name": "sales_qualifier"},
        expect=202,
        show=("Location", "Retry-After"),
    )
    monitor, until = response.headers["location"], time.monotonic() + _START_WITHIN
    while guide.peek(monitor, token).get("status") == "running" and time.monotonic() < until:
        time.sleep(0.1)
    response = ask("How far it is.", f"GET {monitor}", token=token, expect=200)
    check("it is done", response.json().get("status") == "completed")

    # Services, and callers in a hurry
    key = home.issue_key(subject="reports", tier="standard", scopes=["agents:read"])
    time.sleep(1.05)
    response = ask(
        "A service comes with an API key; this one was issued a second ago.",
        "GET /v7/agents",
        key=key,
        expect=200,
        headers={"X-Request-ID": "tour-2026"},
        show=("X-Request-ID", "Vary"),
    )
    check("its own request id came back", response.headers.get("x-request-id") == "tour-2026")

    # The free tier has one request a second, and seconds begin when the clock says so: both fall into the same one,
    # unless the machine stands still in between.
    time.sleep(1.05 - time.time() % 1)
    ask("The free tier has one request a second.", "GET /v7/agents", token=hurried, expect=200)
    response = ask(
        "So the next one is too fast.",
        "GET /v7/agents",
        token=hurried,
        expect=429,
        again=2,
        show=("Retry-After", "X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset", "X-RateLimit-Window"),
    )
    check("the problem says so", _code(response) == "RATE_001")
    time.sleep(int(response.headers.get("retry-after", "1")))
    ask("Who waits as told is served.", "GET /v7/agents", token=hurried, expect=200)

    ask("Good bye.", f"DELETE {path}", token=token, expect=204)
    return [token, reader, expired, hurried, key]


def _read_log(guide: Guide, server: Server, secrets: list[str]) -> None:
    log = server.log()
    print(f"\nThe server wrote {len(log)} lines meanwhile, one per request. The one with the token in its query:")
    for event in log:
        if event.get("status") == 400 and "access_token" in json.dumps(event):
            print(f"    {json.dumps(event)}")
    written = json.dumps(log)
    guide.check("every request was logged", len(log) >= guide.stops)
    guide.check("no credential is in the log", not any(secret in written for secret in secrets))


@contextmanager
def _home(home: Home | None) -> Iterator[Home]:
    if home is not None:
        yield home
        return
    with tempfile.TemporaryDirectory(prefix="sigil_api_") as folder:
        yield Home(folder)


def _code(response: httpx2.Response) -> Any:
    return response.json().get("error_code")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:180]} ... {line[-100:]}"
