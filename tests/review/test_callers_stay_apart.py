"""Nobody becomes somebody else: by a second policy, by a cache, by a file of keys that could not be read in time."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.authentication import requires
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from sigil_policy.core.exchange import Head
from sigil_policy.core.policy import Policy
from sigil_policy.core.stack import PolicyStack
from sigil_policy.identity.api_keys import FileApiKeyStore, MemoryApiKeyStore, new_key
from sigil_policy.policies.api_key import ApiKeyAuth
from sigil_policy.policies.bearer import BearerAuth
from sigil_policy.policies.cache_control import CacheControl, CacheRule
from sigil_policy.policies.scopes import Scopes
from sigil_policy.testing import FrozenClock, drive
from tests.identity.material import NOW, good_claims, make_issuer, token

pytestmark = pytest.mark.anyio

PEPPER = SecretStr("p" * 32)


async def whoami(request: Request) -> PlainTextResponse:
    return PlainTextResponse(request.user.display_name)


def mounted(outer: list[Policy], inner: list[Policy]) -> PolicyStack:
    staff = PolicyStack(Starlette(routes=[Route("/who", whoami)]), policies=inner, clock=FrozenClock(NOW))
    app = Starlette(routes=[Route("/who", whoami), Mount("/staff", staff)])
    return PolicyStack(app, policies=outer, clock=FrozenClock(NOW))


async def test_an_inner_bearer_auth_accepts_only_its_own_issuers() -> None:
    everybody, staff = make_issuer(), make_issuer(url="https://staff.example")
    app = mounted([BearerAuth(issuers=[everybody, staff])], [BearerAuth(issuers=[staff], required=True)])
    theirs = {"authorization": b"Bearer " + token()}
    ours = {"authorization": b"Bearer " + token(good_claims(iss="https://staff.example", sub="eve"))}
    for _ in range(2):  # the second time from the memory of verified tokens
        assert (await drive(app, path="/who", headers=theirs)).body == b"user_123"
        assert (await drive(app, path="/staff/who", headers=theirs)).status == 401
        assert (await drive(app, path="/staff/who", headers=ours)).body == b"eve"


async def test_an_inner_key_store_accepts_only_its_own_keys() -> None:
    plain, record = new_key(pepper=PEPPER, subject="job")
    other, theirs = new_key(pepper=PEPPER, subject="staff-job")
    app = mounted(
        [ApiKeyAuth(store=MemoryApiKeyStore([record, theirs]), pepper=PEPPER)],
        [ApiKeyAuth(store=MemoryApiKeyStore([theirs]), pepper=PEPPER, required=True)],
    )
    headers = {"x-api-key": plain.get_secret_value()}
    assert (await drive(app, path="/who", headers=headers)).body == b"job"
    assert (await drive(app, path="/staff/who", headers=headers)).status == 401
    assert (await drive(app, path="/staff/who", headers={"x-api-key": other.get_secret_value()})).body == b"staff-job"


async def test_an_inner_policy_that_agrees_leaves_what_the_superscope_opened() -> None:
    @requires("whatever")
    async def all_scopes(request: Request) -> PlainTextResponse:
        return PlainTextResponse("in")

    inner = PolicyStack(
        all_scopes_app(all_scopes), policies=[BearerAuth(issuers=[make_issuer()])], clock=FrozenClock(NOW)
    )
    app = PolicyStack(
        Starlette(routes=[Mount("/in", inner)]),
        policies=[BearerAuth(issuers=[make_issuer()]), Scopes()],
        clock=FrozenClock(NOW),
    )
    headers = {"authorization": b"Bearer " + token(good_claims(scope="admin"))}
    assert (await drive(app, path="/in/all", headers=headers)).body == b"in"


def all_scopes_app(endpoint: Any) -> Starlette:
    return Starlette(routes=[Route("/all", endpoint)])


async def test_a_cancelled_caller_leaves_no_key_valid_that_was_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller that happens to read the changed file may leave at that very moment."""
    clock = FrozenClock(NOW)
    store = FileApiKeyStore(tmp_path / "keys.jsonl", clock=clock)
    _, record = new_key(pepper=PEPPER, subject="job")
    store.append(record)
    clock.advance(2)
    assert await found(store, record.id) == record

    gone = new_key(pepper=PEPPER, subject="other").record
    (tmp_path / "keys.jsonl").write_text("")
    store.append(gone)
    clock.advance(2)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await found(store, record.id)
    assert scope.cancelled_caught
    clock.advance(2)
    assert await found(store, record.id) is None


async def test_a_machine_without_file_handles_refuses_keys_for_a_second_and_not_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FrozenClock(NOW)
    store = FileApiKeyStore(tmp_path / "keys.jsonl", clock=clock)
    _, record = new_key(pepper=PEPPER, subject="job")
    store.append(record)
    clock.advance(2)

    def exhausted(*_: object) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", exhausted)
        with pytest.raises(OSError, match="Too many"):
            await found(store, record.id)
        with pytest.raises(ValueError, match="could not be read"):
            await found(store, record.id)
    clock.advance(2)
    assert await found(store, record.id) == record


async def found(store: FileApiKeyStore, key_id: str) -> Any:
    record = store.find(key_id)
    return await record if hasattr(record, "__await__") else record


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("public, max-age=60", "private, max-age=60"),
        ("s-maxage=60", "private"),
        ("no-store", "no-store"),
        (CacheRule("public, max-age=60", dangerously_share_authenticated=True), "public, max-age=60"),
    ],
    ids=["public", "s-maxage", "no-store", "dangerously"],
)
async def test_a_cookie_that_is_set_is_for_one_caller_only(rule: Any, said: str) -> None:
    """RFC 9111 section 7.3: a cache stores `Set-Cookie` with the rest, and hands it to whoever asks next."""

    class Session(Policy):
        def on_response(self, ex: Any, head: Head) -> None:
            head.headers.append((b"set-cookie", b"session=1"))

    app = PolicyStack(plain, policies=[CacheControl(routes={"GET /": rule}), Session()])
    assert (await drive(app)).header("cache-control") == said


async def plain(scope: Any, receive: Any, send: Callable[..., Any]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"x"})
