"""What authentication costs: a token that is remembered, one that is new, an API key, a forged flood of bytes, and the
event loop's longest wait while a key set is fetched anew."""

import asyncio
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import count, cycle
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import RSAAlgorithm
from pydantic import SecretStr

from benchmarks.timing import Block, calls, measure, rounds_for, scopes
from sigil_policy.core.clock import SYSTEM_CLOCK
from sigil_policy.core.exchange import Exchange
from sigil_policy.core.host import PLAIN
from sigil_policy.core.problems import DEFAULT_STYLE, Problem
from sigil_policy.identity.api_keys import MemoryApiKeyStore, new_key
from sigil_policy.identity.issuers import Issuer
from sigil_policy.identity.key_sets import FetchedKeys, KeySet
from sigil_policy.identity.keys import Key
from sigil_policy.identity.tokens import TokenVerifier
from sigil_policy.policies.api_key import ApiKeyAuth
from sigil_policy.policies.bearer import BearerAuth
from sigil_policy.testing import FrozenClock

ISSUER, AUDIENCE = "https://auth.example.com", "sigil-api"
SECRET = "benchmark-" * 4
PEPPER = SecretStr("benchmark-pepper-" * 2)
CALLERS = 1_000
FORGED = 80_000
KEYS = 64


def run(smoke: bool = False) -> dict[str, Any]:
    """Keys: `cached_us` (a token verified before, thousand callers), `api_key_us`, `forged_80k_us` (refused, the
    problem included), `exchange_us` (what the exchange itself costs: not part of the others), and in `verify_us` and
    `pyjwt_us` a new token by algorithm, here and with PyJWT alone given a prepared key; `verify_to_pyjwt` is their
    ratio, and `verify_to_pyjwt_most` the largest of them. `refresh_stall_ms`: the longest that a refresh of 64 RSA
    keys, all of them new, over HTTP from a process of its own keeps the event loop from others, the median of many; it
    is the thread's own time, because what else the machine does is none of the refresh's. `refresh_gap_ms`: the same by
    the clock on the wall, with all that."""
    signers = _signers()
    blocks: dict[str, Block] = {"exchange": calls(_exchange, _headers([[(b"host", b"a")]]))}
    blocks["cached"] = _asked(_bearer(), [_bearer_header(token) for token in _tokens(SECRET, "HS256", CALLERS)])
    blocks["api key"], blocks["unknown api key"] = _api_keys()
    forged = f"{_tokens(SECRET, 'HS256', 1)[0]}{'A' * FORGED}"[:FORGED]
    blocks["forged"] = _asked(_bearer(), [_bearer_header(forged)], refused=True)
    for algorithm, (private, public, key) in signers.items():
        issued = _tokens(private, algorithm, 20)
        blocks[f"verify {algorithm}"] = _verified(key, issued)
        blocks[f"PyJWT {algorithm}"] = _decoded(public, algorithm, issued)
    samples = measure(blocks, rounds=rounds_for(smoke, 60))
    ratios = {algorithm: samples.ratio(f"verify {algorithm}", to=f"PyJWT {algorithm}") for algorithm in signers}
    with _provider() as url:
        stalls = asyncio.run(_stalls(url, 3 if smoke else 60))
    return {
        "cached_us": samples.cost("cached"),
        "api_key_us": samples.cost("api key"),
        "unknown_api_key_us": samples.cost("unknown api key"),
        "forged_80k_us": samples.cost("forged"),
        "exchange_us": samples.cost("exchange"),
        "verify_us": {algorithm: samples.cost(f"verify {algorithm}") for algorithm in signers},
        "pyjwt_us": {algorithm: samples.cost(f"PyJWT {algorithm}") for algorithm in signers},
        "verify_to_pyjwt": ratios,
        "verify_to_pyjwt_most": max(ratios.values()),
        "refresh_stall_ms": 1_000 * median(spent for spent, _ in stalls),
        "refresh_gap_ms": 1_000 * median(passed for _, passed in stalls),
    }


def _signers() -> dict[str, tuple[Any, Any, Key]]:
    """By algorithm: the key that signs, the one that PyJWT verifies with, and ours."""
    signers: dict[str, tuple[Any, Any, Key]] = {
        "HS256": (SECRET, SECRET, Key(algorithm="HS256", secret=SecretStr(SECRET))),
    }
    pair = rsa.generate_private_key(65_537, 2_048)
    pairs: dict[Any, Any] = {
        "RS256": pair,
        "PS256": pair,
        "ES256": ec.generate_private_key(ec.SECP256R1()),
        "ES384": ec.generate_private_key(ec.SECP384R1()),
        "ES512": ec.generate_private_key(ec.SECP521R1()),
        "EdDSA": ed25519.Ed25519PrivateKey.generate(),
    }
    for algorithm, private in pairs.items():
        public = private.public_key()
        pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
        signers[algorithm] = (private, public, Key(algorithm=algorithm, pem=pem))
    return signers


def _tokens(key: Any, algorithm: str, count: int) -> list[str]:
    now = int(time.time())
    claims = {"iss": ISSUER, "aud": AUDIENCE, "iat": now, "exp": now + 86_400, "tier": "pro"}
    return [
        jwt.encode({**claims, "sub": f"caller-{number}", "scope": "agents:read agents:write"}, key, algorithm)
        for number in range(count)
    ]


def _issuer(key: Key) -> Issuer:
    return Issuer(url=ISSUER, audience=AUDIENCE, keys=(key,))


def _bearer() -> BearerAuth:
    return BearerAuth(issuers=(_issuer(Key(algorithm="HS256", secret=SecretStr(SECRET))),))


def _bearer_header(token: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"api.example.com"), (b"authorization", b"Bearer " + token.encode())]


async def _receive() -> dict[str, Any]:
    return {"type": "http.disconnect"}


def _exchange(scope: dict[str, Any]) -> Exchange:
    return Exchange(scope, _receive, SYSTEM_CLOCK, PLAIN, DEFAULT_STYLE)


def _headers(requests: list[list[tuple[bytes, bytes]]]) -> Callable[[], list[Any]]:
    make = scopes(requests)
    return lambda: [make() for _ in range(120)]


def _asked(
    policy: BearerAuth | ApiKeyAuth, requests: list[list[tuple[bytes, bytes]]], *, refused: bool = False
) -> Block:
    """`policy.on_request` alone, on exchanges that were opened before."""
    make = scopes(requests)
    for _ in requests:
        answer = policy.on_request(_exchange(make()))
        if isinstance(answer, Problem) is not refused:
            raise RuntimeError(f"{policy!r} answered {answer!r}")
    return calls(policy.on_request, lambda: [_exchange(make()) for _ in range(120)])


def _api_keys() -> tuple[Block, Block]:
    made = [new_key(pepper=PEPPER, subject=f"job-{number}", tier="pro") for number in range(CALLERS)]
    policy = ApiKeyAuth(store=MemoryApiKeyStore(record for _, record in made), pepper=PEPPER)
    unknown = [new_key(pepper=PEPPER, subject="nobody") for _ in range(20)]

    def headers(plain: SecretStr) -> list[tuple[bytes, bytes]]:
        return [(b"host", b"api.example.com"), (b"x-api-key", plain.get_secret_value().encode())]

    return (
        _asked(policy, [headers(plain) for plain, _ in made]),
        _asked(policy, [headers(plain) for plain, _ in unknown], refused=True),
    )


def _verified(key: Key, tokens: list[str]) -> Block:
    verifier = TokenVerifier([_issuer(key)])
    turns = cycle([token.encode() for token in tokens])
    now = time.time()
    return calls(lambda token: verifier.verify(token, now), lambda: [next(turns) for _ in range(60)])


def _decoded(key: Any, algorithm: str, tokens: list[str]) -> Block:
    turns = cycle(tokens)

    def decode(token: str) -> object:
        return jwt.decode(token, key, [algorithm], audience=AUDIENCE, issuer=ISSUER)

    return calls(decode, lambda: [next(turns) for _ in range(60)])


@contextmanager
def _provider() -> Iterator[str]:
    """A provider in a process of its own, on loopback: the keys of every answer are new."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_publish, args=(theirs,), daemon=True)
    process.start()
    try:
        if not ours.poll(30):
            raise RuntimeError("the provider of the benchmark has not started")
        yield f"http://127.0.0.1:{ours.recv()}/jwks.json"
    finally:
        process.terminate()
        process.join()


def _publish(port: Connection) -> None:
    jwk = RSAAlgorithm.to_jwk(rsa.generate_private_key(65_537, 2_048).public_key(), as_dict=True)
    rounds = count()

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            number = next(rounds)
            keys = [{**jwk, "alg": "RS256", "kid": f"{number}-{key}"} for key in range(KEYS)]
            body = json.dumps({"keys": keys}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Nobody reads it."""

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        port.send(server.server_port)
        server.serve_forever()


async def _stalls(url: str, rounds: int) -> list[tuple[float, float]]:
    """For each refresh, the seconds of the longest turn of the event loop: its thread's own, and those that passed."""
    keys = KeySet(url, allow_insecure_loopback=True, deadline=30)
    fetched = Issuer(url=ISSUER, audience=AUDIENCE, keys=keys).fetched
    if fetched is None:
        raise RuntimeError("an issuer with a KeySet fetches its keys")
    clock = FrozenClock()
    await fetched.obtain(clock)
    stalls, seen = [], {fetched.ring.keys[0].id}
    for _ in range(rounds):
        clock.advance(keys.lifetime)
        stalls.append(await _longest_turn(fetched, clock))
        seen.add(fetched.ring.keys[0].id)
    if len(seen) != rounds + 1 or len(fetched.ring.keys) != KEYS:
        raise RuntimeError(f"{len(seen)} sets of {len(fetched.ring.keys)} keys, not {rounds + 1} of {KEYS}")
    return stalls


async def _longest_turn(fetched: FetchedKeys, clock: FrozenClock) -> tuple[float, float]:
    refresh = asyncio.create_task(fetched.obtain(clock))
    spent = passed = 0.0
    last = time.thread_time(), time.perf_counter()
    while not refresh.done():
        await asyncio.sleep(0)
        now = time.thread_time(), time.perf_counter()
        spent, passed = max(spent, now[0] - last[0]), max(passed, now[1] - last[1])
        last = now
    await refresh
    return spent, passed
