"""What a server answers that nobody has asked for is an outage, and lets nobody in."""

from base64 import urlsafe_b64encode
from typing import Any

import pytest
from pydantic import SecretStr

from sigil_policy.core.stack import PolicyStack
from sigil_policy.identity.api_keys import new_key
from sigil_policy.identity.api_keys.redis import RedisApiKeyStore
from sigil_policy.identity.keys import Key
from sigil_policy.identity.provider import ProviderError, read_object
from sigil_policy.policies.api_key import ApiKeyAuth
from sigil_policy.policies.problems import Problems
from sigil_policy.stores.limits import StoreUnavailableError
from sigil_policy.stores.redis.link import RedisLink
from sigil_policy.stores.redis.tickets import RedisTickets
from sigil_policy.testing import drive

pytestmark = pytest.mark.anyio

PEPPER = SecretStr("canary-pepper-7d0e-which-is-long-enough")
PLAIN, RECORD = new_key(pepper=PEPPER, subject="nightly-job")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Link(RedisLink):
    """A server that answers `reply` to whatever it is asked."""

    def __init__(self, reply: Any) -> None:
        super().__init__("redis://nobody.invalid")
        self.reply = reply

    async def _answer(self) -> Any:
        return self.reply

    def run(self, *_: Any, **__: Any) -> Any:
        return self._answer()


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


@pytest.mark.parametrize("reply", [None, 1, b"OK", [], [None], [b"{}", None, None], [1, None], [b"{}", 5], [[], []]])
async def test_a_key_that_the_server_answers_nonsense_about_is_not_known(reply: Any) -> None:
    store = RedisApiKeyStore(Link(reply))
    for asking in (store.get(RECORD.id), store.end(RECORD.id, 5.0)):
        with pytest.raises(StoreUnavailableError):
            await asking
    app = PolicyStack(hello, [Problems(), ApiKeyAuth(store=store, pepper=PEPPER)])
    sent = await drive(app, headers={"x-api-key": PLAIN.get_secret_value()})
    assert (sent.status, sent.json()["error_code"]) == (503, "SRV_503")


@pytest.mark.parametrize(
    "reply", [None, 1, b"0", [], [None], [b"0", b"id"], [b"0", None, b"{}", None, None], [b"0", b"id", None, b"", b""],
              [0, b"id", b"{}", None, None], [b"0", b"id", b"{}", 5, None]],
)  # fmt: skip
async def test_a_list_of_keys_that_is_none_is_an_outage(reply: Any) -> None:
    with pytest.raises(StoreUnavailableError):
        await RedisApiKeyStore(Link(reply)).records()


@pytest.mark.parametrize("reply", [None, b"1", [], 2, -2, True])
async def test_a_key_is_not_stored_unless_the_server_says_so(reply: Any) -> None:
    with pytest.raises(StoreUnavailableError):
        await RedisApiKeyStore(Link(reply)).save(RECORD)


@pytest.mark.parametrize("make", [RedisApiKeyStore, RedisTickets])
def test_keys_of_stores_begin_alike_and_a_bad_prefix_is_refused(make: Any) -> None:
    store = make("redis://nobody.invalid", prefix="sigil.eu")
    root = getattr(store, "_records", None) or store._sets[0]
    assert root in (b"sigil.eu:1:k:{sigil.eu}:records", b"sigil.eu:1:tickets:{sigil.eu}:ends")
    with pytest.raises(ValueError, match="prefix must be"):
        make("redis://nobody.invalid", prefix="a{b}")
    with pytest.raises(ValueError, match="prefix must be"):
        make("redis://nobody.invalid", prefix="a\n")


@pytest.mark.parametrize(("bits", "exponent"), [(8_200, 65_537), (16_384, 65_537), (2_048, (1 << 2_040) | 1)])
def test_a_key_that_takes_long_to_verify_with_is_refused(bits: int, exponent: int) -> None:
    """Whoever publishes a key set chooses its keys, and everybody waits while one of them verifies."""

    def number(value: int) -> str:
        return urlsafe_b64encode(value.to_bytes((value.bit_length() + 7) // 8, "big")).rstrip(b"=").decode()

    def jwk(bits: int, exponent: int) -> dict[str, str]:
        return {"kty": "RSA", "alg": "RS256", "n": number((1 << (bits - 1)) | 0x1234567), "e": number(exponent)}

    with pytest.raises(ValueError, match="takes too long to verify"):
        Key(jwk=jwk(bits, exponent))
    assert Key(jwk=jwk(8_192, 65_537)).algorithm == "RS256"


@pytest.mark.parametrize("body", [b'{"a":[' + b"1," * 4_096 + b"1]}", b'{"a":[' + b'"",' * 20_000 + b'""]}'])
def test_what_a_provider_publishes_has_so_many_items(body: bytes) -> None:
    with pytest.raises(ProviderError, match="no JSON object"):
        read_object(body)
    assert len(read_object(b'{"a":[' + b"1," * 4_000 + b"1]}")["a"]) == 4_001
