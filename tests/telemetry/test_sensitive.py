"""What is secret: names, and texts."""

import re
import time
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sigil_policy.telemetry.sensitive import _SECRET_NAMES, _STEMS, _STRONG_NAMES, CLEAR, COUNT, SECRET, SecretRules
from tests.telemetry.planted import READABLE_NAMES, SECRET_NAMES, VALUES

RULES = SecretRules()


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_names_of_secrets(name):
    assert RULES.is_secret(name)


@pytest.mark.parametrize("name", READABLE_NAMES)
def test_names_that_only_look_like_it(name):
    assert not RULES.is_secret(name)


@pytest.mark.parametrize("name", ["tokens", "refresh_tokens", "X-Tokens"])
def test_tokens_are_counted(name):
    assert RULES.verdict(name) == COUNT


@given(st.sampled_from(["api_key", "access_token", "client_secret", "db_password"]), st.randoms())
def test_spelling_does_not_matter(name, random):
    words = name.split("_")
    joint = random.choice(["_", "-", ".", " ", ""])
    spelled = joint.join(word.capitalize() if joint == "" else random.choice((word, word.upper())) for word in words)
    assert RULES.is_secret(spelled)


def test_every_secret_name_holds_a_stem():
    """A text without any stem is not searched for names at all."""
    for name in (*_SECRET_NAMES, *_STRONG_NAMES, "tokens"):
        assert any(stem in name for stem in _STEMS), name


@given(st.text(max_size=300))
def test_any_name_gets_a_verdict(name):
    assert RULES.verdict(name) in (CLEAR, SECRET, COUNT)
    assert RULES.verdict(name) == SecretRules().verdict(name)


def test_verdicts_are_remembered_within_bounds():
    rules = SecretRules()
    for number in range(10_000):
        rules.verdict(f"name-{number}" + "x" * 1_000)
    assert len(rules._verdicts) <= 4_096
    assert max(map(len, rules._verdicts)) <= 256


@pytest.mark.parametrize("name", VALUES)
def test_secrets_in_a_text(name):
    text, secret = VALUES[name]
    for around in ("{}", "before {} after", "({})", "\n{}\n", "error: {}", "x={}"):
        scrubbed = RULES.scrub(around.format(text))
        if name.startswith("json-escapes") or name == "json-doubled":
            continue  # only readable as JSON, see test_redaction
        assert secret not in scrubbed, scrubbed
        assert "[REDACTED]" in scrubbed


CLEAN = [
    "GET /v7/agents/alpha 200 in 12.3ms",
    "550e8400-e29b-41d4-a716-446655440000",
    "2026-11-23T12:34:56.789Z",
    "https://example.com:8443/a/b?page=2&per_page=10#top",
    "https://ada@example.com/profile",
    "https://example.com:80/@ada?x=1",
    "mail ada@example.com: see http://a.example and http://b.example/@x",
    "Bearer token missing; expected Bearer authentication",
    'WWW-Authenticate: Bearer realm="api", error="invalid_token"',
    "basic usage, Basic plan, basic authentication",
    "max_tokens=100 tokens_used=5 tokens=12 total_tokens: 412",
    "idempotency_key=abc token_type=bearer",
    "password=None api_key=null secret='' token=",
    "task-management-framework and risk-assessment-report",
    "monkey=1 keyboard=2 author=ada",
    "agents:read agents:write",
    "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----",
    "-----BEGIN PUBLIC KEY-----\nMIIB\n-----END PUBLIC KEY-----",
    "ghost ghp_ eyJ AKIA sk-1 sk_live_ xoxb",
    "100%25 of 50% and %zz",
    "missing fields: 'password', 'email'",
    "['password', 'email']",
    "auth0|507f1f77bcf86cd799439011",
    "stratum=SOMA name=alpha-1",
]


@pytest.mark.parametrize("text", CLEAN)
def test_clean_texts_stay_as_they_are(text):
    assert RULES.scrub(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgres://app:pw@db/main", "postgres://app:[REDACTED]@db/main"),
        ("/x?password=a&page=2", "/x?password=[REDACTED]&page=2"),
        ('{"password": "a \\" b", "page": 2}', '{"password": "[REDACTED]", "page": 2}'),
        ("Authorization: Bearer abc\nHost: x", "Authorization: [REDACTED]\nHost: x"),
        ("curl -H 'Authorization: Digest x' http://h", "curl -H 'Authorization: [REDACTED]' http://h"),
        ("credentials={'user': 'u', 'k': ('v',)} rest", "credentials=[REDACTED] rest"),
        ("sent Bearer abc.def to x", "sent Bearer [REDACTED] to x"),
        ("refresh_tokens=abc tokens=12", "refresh_tokens=[REDACTED] tokens=12"),
        ("next=https%3A%2F%2Fu%3Ap%40h%2F&a=1", "next=[REDACTED]&a=1"),
    ],
)
def test_what_is_around_a_secret_stays(text, expected):
    assert RULES.scrub(text) == expected


PIECES = [
    "password", "token", "tokens", "api_key", "Cookie", "Authorization", "=", ": ", "=>", ">", "<", '"', "'", "\\", "{",
    "}", "[", "]", "(", ")", ",", " ", "\n", "&", "?", "://", "@", "%", "%25", "%3D", "%22", "a", "1", "eyJ", ".", "-",
    "_", "Bearer ", "Basic ", "-----BEGIN ", "PRIVATE KEY", "-----END ", "[REDACTED]", "none", "abc123", "sk_live_",
    "AKIA", ", input_value=", ", input_type=str]", "Value error, ", " [type=value_error, ", "Input tag '",
    "' found using ", "Invalid enum value ", "must be (got ", "must match regex ", " doesn't)", "Attribute(name=",
    "Select a valid choice. ", " is not one of the available choices", "'loc': 'msg'",
    "'input': ", "\\\"ctx\\\":", "\u201c", "\u201d value ",
]  # fmt: skip
hostile_texts = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


@given(hostile_texts)
def test_scrubbing_twice_is_scrubbing_once(text):
    once = RULES.scrub(text)
    assert RULES.scrub(once) == once


@given(hostile_texts, st.sampled_from(sorted(VALUES)), hostile_texts)
def test_a_credential_is_found_whatever_surrounds_it(before, name, after):
    """Only what has a form of its own: a name and a value can be torn apart by what stands around them."""
    if name not in (
        "stripe-live",
        "own-key",
        "webhook",
        "aws",
        "github",
        "github-fine",
        "anthropic",
        "google",
        "slack",
        "pem",
    ):
        name = "jwt"
    text, secret = VALUES[name]
    assert secret not in RULES.scrub(f"{before} {text} {after}")


HOSTILE = sorted({*(a + b for a, b in product(PIECES, ("", "=", '"', "\\", ":", "a", " ")))} - {""})


def test_time_grows_with_the_text_and_not_faster():
    """Every pair of pieces repeated to 20,000 characters; a quadratic rule would need minutes for one of them."""
    for unit in HOSTILE:
        text = (unit * 20_000)[:20_000]
        # Any that is quick enough will do: what else the machine does is not counted.
        assert any(_timed(text) < 0.5 for _ in range(5)), unit


@pytest.mark.parametrize(
    "unit",
    [
        *("a=", 'token="', "eyJ.", "://a:@", "bearer ", "%25", 'pw:\\"', "token=[", "token=['", 'token=[\\"'),
        *(", input_value=", ", input_value=, input_type=", "Value error, ", "'Value error, ", "Input tag '"),
        *("'loc''msg' 'input': ", "'loc''msg' 'input': <", "must (got ", "must (got '", "Attribute(name=", "\u201c"),
        *("'\\", "\u201ca\u201d ", "Invalid enum value '", "Select a valid choice. "),
    ],
)
def test_twice_the_text_costs_about_twice(unit):
    """Four times costs about four times, and what grows with the square sixteen times; the bound is between the two."""
    short, long = (unit * 20_000)[:20_000], (unit * 80_000)[:80_000]
    # By turns, and the quickest of each: a machine that is slow for a while is slow for both.
    taken = [(_timed(short), _timed(long)) for _ in range(7)]
    assert min(cost for _, cost in taken) < 8 * min(cost for cost, _ in taken) + 0.002


def _timed(text):
    started = time.thread_time()
    RULES.scrub(text)
    return time.thread_time() - started


def test_no_pattern_repeats_what_it_has_given_back():
    """Unbounded repeats are possessive, or are the last of a pattern that is searched for by a literal."""
    from sigil_policy.telemetry import echoes, literals, sensitive

    for name, pattern in (*vars(sensitive).items(), *vars(echoes).items(), *vars(literals).items()):
        if isinstance(pattern, re.Pattern):
            greedy = re.findall(r"(?<!\\)[\])][*+](?![+?])|\.\*(?![+?])", pattern.pattern)
            assert not greedy or name == "_WORD", (name, pattern.pattern)


def test_an_application_adds_its_own():
    rules = SecretRules(names=["x-internal"], safe=["csrf_token"], patterns=[r"acme_[a-z0-9]{8}"])
    assert rules.is_secret("X_Internal")
    assert not rules.is_secret("csrfToken")
    assert rules.is_secret("access_token")
    assert rules.scrub("x-internal=abc acme_01234567 csrf_token=x") == "x-internal=[REDACTED] [REDACTED] csrf_token=x"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"names": "password"}, TypeError, "names is a list of strings"),
        ({"patterns": "a+"}, TypeError, "patterns is a list of strings"),
        ({"names": ["--"]}, ValueError, "holds no word"),
        ({"patterns": ["("]}, ValueError, "must be regular expressions"),
    ],
)
def test_wrong_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        SecretRules(**options)


def test_hundreds_of_encoded_parts_are_hidden_unread_and_keep_nobody_busy() -> None:
    text = "&".join(["note=%2561"] * 64 + ["note=%70assword%3Dhunter2"] * 40)
    scrubbed = SecretRules().scrub(text)
    assert "hunter2" not in scrubbed
    assert scrubbed.count("note=%2561") <= 64
    assert SecretRules().scrub("&".join(["a=%20b"] * 30)) == "&".join(["a=%20b"] * 30)
