"""How fast this machine is: what some small things take here, and took where the targets were set.

A target in microseconds says something of a machine, too. `machine` is what this one takes in relation to that one, the
median over all floors: a figure divided by it can be compared with its target. Ratios of one run need none of this.
"""

import time
from functools import partial
from statistics import median
from timeit import Timer
from typing import Any

from benchmarks.stack import AUDIENCE, ISSUER, SECRET, requests, tokens
from benchmarks.timing import measure, rounds_for

FLOORS_US = {
    "dict(headers)": 0.289,
    "Headers(scope=scope).get('x-client-id')": 0.791,
    "MutableHeaders(raw=[*two])['etag'] = 'a'": 1.13,
    "str(uuid4())": 2.55,
    "sha256(body).hexdigest()": 0.939,
    "hmac.digest(key, body[:250], 'sha256')": 1.74,
    "least['key']": 0.148,
    "lasting['key']": 0.374,
    "json.dumps(fields)": 3.96,
    "jwt.decode(token, key, ['HS256'], audience=audience, issuer=issuer)": 40.67,
}
"""What each took there. Between them: dictionaries, calls, objects, hashes, and much Python."""

_SETUP = """
import hmac, json
from hashlib import sha256
from uuid import uuid4
import jwt
from cachetools import LRUCache, TTLCache
from starlette.datastructures import Headers, MutableHeaders
scope = {"type": "http", "headers": headers}
two = [(b"content-type", b"application/json"), (b"content-length", b"100")]
least, lasting = LRUCache(1_000), TTLCache(1_000, 3_600)
least["key"] = lasting["key"] = 1
fields = {"timestamp": "2026-01-11T00:00:00.000Z", "level": "info", "event": "exchange", "method": "GET",
    "path": "/v7/agents/ada", "status": 200, "duration_ms": 1.25, "bytes": 100, "request_id": "a" * 36,
    "subject": "caller-1", "tier": "pro", "outcome": "ok"}
"""


def run(smoke: bool = False) -> dict[str, Any]:
    """Keys: `machine`, and `factors`: by floor, what it takes here in relation to there."""
    known = {
        "headers": [*requests()[0], (b"x-client-id", b"nightly")],
        "body": b"x" * 1024,
        "key": SECRET.encode(),
        "token": tokens()[0],
        "audience": AUDIENCE,
        "issuer": ISSUER,
    }
    timers = {floor: Timer(floor, _SETUP, time.process_time, known) for floor in FLOORS_US}
    samples = measure({floor: partial(_block, timer) for floor, timer in timers.items()}, rounds=rounds_for(smoke, 25))
    factors = {floor: samples.cost(floor) / there for floor, there in FLOORS_US.items()}
    return {"machine": median(factors.values()), "factors": factors}


def _block(timer: Timer, calls: int = 1_000) -> float:
    return timer.timeit(calls) / calls * 1e6
