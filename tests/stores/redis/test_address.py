"""URLs of stores: what they mean, and that a wrong one fails without showing what is secret."""

import ssl

import pytest

from sigil_policy.stores.redis.address import Address, Credentials, Endpoint
from sigil_policy.stores.redis.link import RedisLink


@pytest.mark.parametrize(
    ("url", "kind", "endpoints", "db", "service"),
    [
        ("redis://", "single", [("localhost", 6379)], 0, ""),
        ("redis://cache.internal", "single", [("cache.internal", 6379)], 0, ""),
        ("valkey://cache.internal:7000/", "single", [("cache.internal", 7000)], 0, ""),
        ("REDIS://[::1]:7000/15", "single", [("::1", 7000)], 15, ""),
        ("redis://h?db=4", "single", [("h", 6379)], 4, ""),
        ("redis+cluster://a:1,b:2,[fe80::1]", "cluster", [("a", 1), ("b", 2), ("fe80::1", 6379)], 0, ""),
        ("valkey+cluster://a", "cluster", [("a", 6379)], 0, ""),
        ("redis+sentinel://a,b:2/main", "sentinel", [("a", 26379), ("b", 2)], 0, "main"),
        ("redis+sentinel://a/my%20main/3", "sentinel", [("a", 26379)], 3, "my main"),
    ],
)
def test_a_url_says_where_the_server_is(
    url: str, kind: str, endpoints: list[tuple[str, int]], db: int, service: str
) -> None:
    address = Address.parse(url)
    assert (address.kind, address.db, address.service) == (kind, db, service)
    assert [(endpoint.host, endpoint.port) for endpoint in address.endpoints] == endpoints
    assert address.tls is None
    assert address.credentials == Credentials()


@pytest.mark.parametrize("scheme", ["unix", "redis+unix", "valkey+unix", "UNIX"])
def test_a_url_may_name_a_socket(scheme: str) -> None:
    address = Address.parse(f"{scheme}://:p@/run/my%20valkey.sock?db=2")
    assert address.endpoints == (Endpoint("", 0, "/run/my valkey.sock"),)
    assert (address.db, address.credentials.password) == (2, "p")


@pytest.mark.parametrize("url", ["rediss://h", "valkeys://h", "rediss+cluster://h", "rediss+sentinel://h/main"])
def test_tls_verifies_unless_told_otherwise(url: str) -> None:
    context = Address.parse(url).tls
    assert context is not None
    assert context.check_hostname
    assert context.verify_mode == ssl.CERT_REQUIRED
    lax = Address.parse(f"{url}?ssl_check_hostname=false").tls
    assert lax is not None
    assert not lax.check_hostname
    assert lax.verify_mode == ssl.CERT_REQUIRED
    none = Address.parse(f"{url}?ssl_cert_reqs=none").tls
    assert none is not None
    assert none.verify_mode == ssl.CERT_NONE


def test_user_and_password_are_decoded_and_shown_nowhere() -> None:
    url = "redis+sentinel://us%40er:s3%3Acr%2Fet@h/main?sentinel_username=w&sentinel_password=gu%26rd"
    address = Address.parse(url)
    assert address.credentials == Credentials("us@er", "s3:cr/et")
    assert address.sentinels == Credentials("w", "gu&rd")
    for shown in (repr(address), str(address), repr(address.credentials), repr(RedisLink(url))):
        for secret in ("s3", "et@", "gu", "us@er"):
            assert secret not in shown


@pytest.mark.parametrize(
    "url",
    [
        "",
        "h:6379",
        "http://s3cret",
        "redis+tls://s3cret",
        "unix+cluster://s3cret",
        "redis:/s3cret",
        "redis://s3cret@h",
        "redis://user:@h",
        "redis://:s3cret",
        "redis://:s3/cret@h",
        "redis://:s3?cret@h",
        "redis://:s3#cret@h",
        "redis://:s3@cret@h",
        "redis://:s3 cret@h",
        "redis://h:s3cret",
        "redis://h:0",
        "redis://h:65536",
        "redis://h:¼",
        "redis://h:+1",
        "redis://h/s3cret",
        "redis://h/-1",
        "redis://h/0/s3cret",
        "redis://h/1?db=2",
        "redis://h?db=1&db=2",
        "redis://h?db",
        "redis://h?s3cret=1",
        "redis://h?ssl_cert_reqs=none",
        "redis://h?sentinel_password=s3cret",
        "redis://h?client_name=s3%20cret",
        "redis://a,b",
        "redis",
        "redis://[::1",
        "redis://[::1]s3cret",
        "redis://s3cret%2f",
        "redis+cluster://",
        "redis+cluster://a,",
        "redis+cluster://a/1",
        "redis+sentinel://a",
        "redis+sentinel:///main",
        "redis+sentinel://a/main/s3cret",
        "unix://",
        "unix://s3cret",
        "unix://h/path",
        "rediss://h?ssl_cert_reqs=s3cret",
        "rediss://h?ssl_check_hostname=s3cret",
        "rediss://h?ssl_keyfile=/s3cret",
        "rediss://h?ssl_ca_certs=/s3cret",
        "rediss://h?ssl_certfile=/s3cret",
    ],
)
def test_a_wrong_url_fails_at_construction_and_shows_nothing_of_it(url: str) -> None:
    with pytest.raises(ValueError, match="Expected: redis://") as caught:
        RedisLink(url)
    assert "s3" not in str(caught.value)
    assert "cret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("deadline", 0),
        ("deadline", 61),
        ("deadline", float("nan")),
        ("connect_timeout", 0.01),
        ("connect_timeout", 100),
        ("failures", 0),
        ("max_in_flight", 0),
        ("max_reply", 10),
    ],
)
def test_an_option_that_cannot_work_fails_at_construction(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=option) as caught:
        RedisLink("redis://h", **{option: value})  # type: ignore[arg-type]
    assert repr(value) in str(caught.value)
