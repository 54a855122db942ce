"""Which names and which texts are secret: the rules behind every redaction.

    rules = SecretRules()
    rules.is_secret("X-Api-Key")                    # True
    rules.is_secret("max_tokens")                   # False
    rules.scrub("GET /login?password=hunter2")      # 'GET /login?password=[REDACTED]'

**Names** are compared as words: `apiKey`, `api-key`, `API_KEY` and `api%5Fkey` are one name. A name is secret if it
ends with the words of a secret (`db_password`), or holds one of the strong words anywhere (`password_confirmation`).
The longest ending decides, so `per_token` is readable though `token` is not. What ends with `tokens` counts
language-model tokens: readable where its value is a number.

**Texts** lose what looks like a credential whatever it is called (JWT, `Bearer` and `Basic` credentials, keys with a
known prefix, PEM private keys, passwords in URLs), and the value after a secret name (`password=...`,
`"token": "..."`, `Cookie: ...`), and the input that validations repeat when they refuse it (see `echoes`). A text is
read a bounded number of times from left to right.
"""

import binascii
import re
from base64 import b64decode
from collections.abc import Callable, Iterable
from urllib.parse import unquote

from sigil_policy.telemetry.echoes import hide_echoes
from sigil_policy.telemetry.literals import OPENING, REDACTED, end_of_brackets, end_of_quoted

CLEAR, SECRET, COUNT = 0, 1, 2
"""What a name says of its value: nothing, that it is secret, that it is secret unless it is a number."""


def _listed(names: str) -> tuple[str, ...]:
    return tuple(names.split())


_SECRET_NAMES = _listed("""
    password passwords passwd pwd pw pass passphrase passcode pin otp totp cvv cvc ssn card_number credit_card
    secret secrets secret_id client_secret secret_key access_key signing_key encryption_key master_key account_key
    shared_key auth_key ssh_key session_key service_key subscription_key hmac_key private_key privatekey
    api_key api_keys apikey apikeys x_api_key key_value
    token accesstoken refreshtoken authtoken idtoken apitoken sessiontoken csrftoken xsrftoken id_token_hint token_value
    token_hash jwt bearer assertion client_assertion code_verifier authorization_code auth_code device_code
    auth authorization credential credentials creds cookie cookies set_cookie
    sessionid phpsessid jsessionid sessid connect_sid sid dsn connection_string conn_str sig signature
""")
"""Endings of secret names. `session_id` is no session cookie: the guidelines' X-Session-ID correlates log lines."""

_STRONG_NAMES = _listed("""
    password passwd passphrase secret secrets credential credentials authorization api_key apikey private_key
    access_token refresh_token id_token session_token
""")
"""Secret wherever they stand in a name, unless it ends with one of `_ABOUT`."""

_ABOUT = _listed("""
    at on age count length policy type types name names enabled required expires expired expiry in version prefix
    status error errors field fields method url uri endpoint path file server servers strength rotation id
""")
"""Last words of names that tell about a secret and do not hold it: `password_changed_at`, `api_key_id`."""

_SAFE_NAMES = _listed("""
    max_tokens min_tokens total_tokens input_tokens output_tokens prompt_tokens completion_tokens reasoning_tokens
    cached_tokens tokens_used tokens_remaining tokens_limit tokens_per_minute token_type token_count token_usage
    token_budget token_limit idempotency_key page_token next_token next_page_token continuation_token per_token
    first_token stop_token eos_token bos_token pad_token unk_token public_key primary_key foreign_key sort_key
    partition_key cache_key
""")

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_LONGEST_NAME = 256
# Every secret name holds one of these, so a text with none of them has no secret name.
_STEMS = _listed("""
    pass pw pin otp cvv cvc ssn card secret key token jwt bearer assertion code auth cred cookie sess sid dsn conn sig
""")
_MOST_NAMES = 4_096

# What follows "Bearer" where somebody writes about it.
_PROSE = _listed("""
    auth authentication authorization challenge credential credentials error error_description for header headers in is
    not of only or realm required resource_metadata scheme schemes scope token tokens was with
""")

# Linear on any text: what an attempt has read is not read again. Long runs are matched as a whole, and a function
# decides what they are.
_JWT = re.compile(r"eyJ[A-Za-z0-9_-]*+(\.[A-Za-z0-9_-]*+)?(?:\.[A-Za-z0-9_-]*+)*+")
_SCHEME = re.compile(r"\b(bearer|basic|dpop)((?:[\s+]|%20){1,8}+)([A-Za-z0-9._~+/=%-]++)", re.IGNORECASE | re.ASCII)
_UNDERSCORED = re.compile(
    r"[sr]k_(?:live|test|prod)_[A-Za-z0-9_]{4,}+|whsec_[A-Za-z0-9+/=_-]{8,}+|gh[opsur]_[A-Za-z0-9]{16,}+"
    r"|github_pat_[A-Za-z0-9_]{16,}+|wst_[A-Za-z0-9_-]{16,}+"
)
_DASHED = re.compile(
    r"(?:(?<![A-Za-z0-9])sk-|sk-ant-|sk-proj-|sk-svcacct-)[A-Za-z0-9_-]{16,}+|xox[a-z]-[A-Za-z0-9-]{8,}+"
)
_UPPER = re.compile(r"A(?:Iza[A-Za-z0-9_-]{30,}+|(?:KIA|SIA|BIA|CCA|3T[A-Z0-9])[A-Z0-9]{16,}+)")
_PEM = re.compile(
    r"-----BEGIN [A-Z0-9 ]{0,40}?PRIVATE KEY.*?(?:-----END [A-Z0-9 ]{0,40}?PRIVATE KEY(?: BLOCK)?-----|\Z)", re.DOTALL
)

_RUN = re.compile(r"""[\s"'<>\\]""")
_AUTHORITY_END = re.compile(r"[/?#]")
_PORT = re.compile(r"[0-9]{1,5}(?:[/?#]|\Z)")
_LONG_USER = 16

# Neither a name nor any known form of a secret is spelled with these alone: times, numbers, hexadecimal ids, UUIDs.
_HARMLESS = re.compile(r"[0-9a-f:.TZ+, -]*+").fullmatch
_NOTHING = re.compile(r"(?!)").fullmatch

# A name and what stands between it and its value. The look-behind lets a search begin at the start of a word only.
_NAME = re.compile(
    r"""(?<![A-Za-z0-9_.%-])([A-Za-z0-9_.%-]++)"""
    r"""(?:(?:\\{0,8}+["'])?+\]?+(?:\[[0-9]{0,8}+\])?+[ \t]{0,8}+(=>|->|[:=>])|(\\{0,8}+["']),)[ \t]{0,8}+"""
)
_WORD_VALUE = re.compile(r"[^\s&]*+")
_LINE_VALUE = re.compile(r"[^\r\n]*+")
_ELEMENT_VALUE = re.compile(r"[^<\r\n]*+")
_NUMBER = re.compile(r"[+-]?[0-9][0-9.,_]*+[,;]?")
_EMPTY = frozenset(("", "none", "null", "nil", "true", "false", "undefined", REDACTED.lower()))
_WHOLE_LINE = frozenset(("authorization", "cookie"))

_MOST_ENCODED = 64
_ENCODED = re.compile(r"""[^\s&=?/"']++""")


class SecretRules:
    """The rules, with what an application adds to them.

    SecretRules(names=["x-internal"], safe=["csrf_token"], patterns=[r"acme_[a-z0-9]{32}"])

    Options:
        names: more endings of secret names, in any spelling.
        safe: endings of names that are readable after all; they win over `names` of the same length.
        patterns: regular expressions of more values that are secret wherever they stand. They see hostile text: use
            bounded or possessive repeats.
    """

    def __init__(self, names: Iterable[str] = (), safe: Iterable[str] = (), patterns: Iterable[str] = ()) -> None:
        for given, option in ((names, "names"), (safe, "safe"), (patterns, "patterns")):
            if isinstance(given, str):
                raise TypeError(f"{option} is a list of strings, not one string; write {option}=[{given!r}]")
        names, safe = tuple(names), tuple(safe)
        self._secret = frozenset((*_SECRET_NAMES, *map(_spelled, names)))
        self._safe = frozenset((*_SAFE_NAMES, *map(_spelled, safe)))
        self._strong = tuple(f"_{name}_" for name in _STRONG_NAMES)
        self._stems = (*_STEMS, *(max(_words(name), key=len) for name in names))
        self._verdicts: dict[str, int] = {}
        # `harmless(text)` tells at once that nothing can be secret in it.
        # Most of what is logged is logged again. Whoever fills these bounds them: names that are not secret, among them
        # those that count, and texts without a secret, short and printable ones only.
        self.clear_names: set[str] = set()
        self.counted_names: set[str] = set()
        self.clean: set[str] = set()
        try:
            self._patterns = tuple(re.compile(pattern) for pattern in patterns)
        except re.error as error:
            raise ValueError(f"patterns must be regular expressions; {error.pattern!r} is none: {error.msg}") from None
        self.extended = bool(names or safe or self._patterns)
        self.harmless = _NOTHING if self.extended else _HARMLESS

    # --- names -----------------------------------------------------------------------------------------------------

    def is_secret(self, name: str) -> bool:
        """Whether a value of this name must not be shown."""
        return self.verdict(name) == SECRET

    def verdict(self, name: str) -> int:
        """CLEAR, SECRET or COUNT."""
        known = self._verdicts.get(name)
        if known is None:
            if len(self._verdicts) >= _MOST_NAMES:
                self._verdicts.clear()
            known = self._verdicts[name[-_LONGEST_NAME:]] = self._judge(name)
        return known

    def _judge(self, name: str) -> int:
        words = _words(name)
        for start in range(len(words)):
            ending = "_".join(words[start:])
            if ending in self._safe:
                return CLEAR
            if ending in self._secret:
                return SECRET
        if not words:
            return CLEAR
        if words[-1] not in _ABOUT:
            whole = f"_{'_'.join(words)}_"
            if any(strong in whole for strong in self._strong):
                return SECRET
        return COUNT if words[-1] == "tokens" else CLEAR

    # --- texts -----------------------------------------------------------------------------------------------------

    def scrub(self, text: str) -> str:
        """`text` without what looks like a secret. The same object if nothing does.

        Of what is percent-encoded the first 64 parts are read; those behind them are hidden unread.
        """
        return self._scrub(text, 0, [_MOST_ENCODED])

    def _scrub(self, text: str, decoded: int, budget: list[int]) -> str:
        if "eyJ" in text:
            text = _JWT.sub(_jwt, text)
        if "_" in text and ("k_" in text or "gh" in text or "whsec_" in text or "wst_" in text):
            text = _UNDERSCORED.sub(REDACTED, text)
        if "-" in text:
            if "-----BEGIN" in text:
                text = _PEM.sub(REDACTED, text)
            if "sk-" in text or "xox" in text:
                text = _DASHED.sub(REDACTED, text)
        if "A" in text:
            text = _UPPER.sub(REDACTED, text)
        for pattern in self._patterns:
            text = pattern.sub(REDACTED, text)
        lowered = text.lower()
        if "'" in text or "," in text or "valid" in lowered or "\u201d" in text:
            text = hide_echoes(text)
        if "bearer" in lowered or "basic" in lowered or "dpop" in lowered:
            text = _SCHEME.sub(_scheme, text)
        if "%" in text and decoded < 3:
            text = _ENCODED.sub(self._encoded(decoded + 1, budget), text)
        if "@" in text and "://" in text:
            head, *rest = text.split("://")
            text = "://".join((head, *(_userinfo(part) if "@" in part else part for part in rest)))
        if ":" in text or "=" in text or ">" in text or "(" in text:
            for stem in self._stems:
                if stem in lowered:
                    return self._pairs(text)
            if "%" in text:
                return self._pairs(text)
        return text

    def _encoded(self, decoded: int, budget: list[int]) -> Callable[[re.Match[str]], str]:
        def hide(found: re.Match[str]) -> str:
            run = found[0]
            if "%" not in run:
                return run
            # Who sends hundreds of them wants to keep us busy: each costs as much as a text of its own.
            budget[0] -= 1
            if budget[0] < 0:
                return REDACTED
            plain = unquote(run)
            return run if plain == run or self._scrub(plain, decoded, budget) == plain else REDACTED

        return hide

    def _pairs(self, text: str) -> str:
        """Hide what follows a secret name."""
        parts: list[str] = []
        done = 0
        verdicts = self._verdicts
        for found in _NAME.finditer(text):
            name = found[1]
            verdict = verdicts.get(name)
            if verdict is None:
                verdict = self.verdict(name)
            if verdict == CLEAR or found.start() < done:
                continue
            if found[3] is not None and (text.startswith(")", found.end()) or not _opens_tuple(text, found.start())):
                continue
            start, end, closing = _value(text, found)
            value = text[start:end]
            if is_empty(value) or (verdict == COUNT and is_number(value)):
                continue
            parts += (text[done:start], REDACTED, closing)
            done = end
        if not parts:
            return text
        parts.append(text[done:])
        return "".join(parts)


def is_empty(value: str) -> bool:
    """Whether a value says that there is no secret, or that it was hidden already."""
    return value.strip().lower() in _EMPTY


def is_number(value: str) -> bool:
    return _NUMBER.fullmatch(value) is not None


def _words(name: str) -> list[str]:
    name = name[-_LONGEST_NAME:]
    for _ in range(3):  # encoded again by whoever put it into a parameter
        if "%" not in name:
            break
        name = unquote(name)
    return [word.lower() for word in _WORD.findall(name)]


def _spelled(name: str) -> str:
    words = _words(name)
    if not words:
        raise ValueError(f"{name!r} holds no word; names are compared as words of A-Z a-z, for example 'api_key'")
    return "_".join(words)


def _jwt(found: re.Match[str]) -> str:
    return found[0] if found[1] is None else REDACTED


def _scheme(found: re.Match[str]) -> str:
    scheme, space, value = found.groups()
    if scheme[0] in "Bb" and scheme[1] in "aA":
        if not _is_basic(value):
            return found[0]
    elif value.split("=", 1)[0].rstrip(".").lower() in _PROSE:
        return found[0]
    return f"{scheme}{space}{REDACTED}"


def _is_basic(value: str) -> bool:
    """Whether this is the `user:password` of RFC 7617 and not a word."""
    if len(value) >= 24:
        return True
    plain = unquote(value).rstrip("=")
    try:
        return b":" in b64decode(plain + "=" * (-len(plain) % 4))
    except (binascii.Error, ValueError):
        return False


def _userinfo(part: str) -> str:
    """What follows a `://`, without the password before its `@` (RFC 3986 section 3.2.1)."""
    run = _RUN.split(part, 1)[0]
    slash = len(_AUTHORITY_END.split(run, 1)[0])
    at = run.rfind("@", 0, slash)
    if at < 0:
        # Either the "@" belongs to the path, or somebody put a "/" into the password unquoted.
        at, colon = run.rfind("@"), run.find(":", 0, slash)
        if at < 0 or colon < 0 or run.startswith("[") or _PORT.match(run, colon + 1):
            return part
    user, colon, password = run[:at].partition(":")
    if password:
        password = REDACTED
    if len(user) >= _LONG_USER:
        user = REDACTED
    return f"{user}{colon}{password}{part[at:]}"


def _opens_tuple(text: str, start: int) -> bool:
    """Whether the quoted name before `start` begins a pair in brackets, as in `(b'authorization', b'...')`."""
    return text[max(0, start - 3) : start].rstrip("bu\"'\\").endswith("(")


def _value(text: str, found: re.Match[str]) -> tuple[int, int, str]:
    """Where the value after a name begins and ends, and what has to close it."""
    start = found.end()
    opening = OPENING.match(text, start)
    if opening is not None:
        escapes, quote = len(opening[1]), opening[2]
        end = end_of_quoted(text, opening.end(), escapes, quote)
        return opening.end(), end, "" if end < len(text) else opening[1] + quote
    if text.startswith(REDACTED, start):
        return start, start + len(REDACTED), ""
    if text[start : start + 1] in ("{", "[", "("):
        return start, end_of_brackets(text, start), ""
    if found[2] == ">":
        pattern = _ELEMENT_VALUE
    elif _words(found[1])[-1] in _WHOLE_LINE:
        before = text[found.start() - 1 : found.start()]
        if before in ('"', "'"):
            return start, end_of_quoted(text, start, 0, before), ""
        pattern = _LINE_VALUE
    else:
        pattern = _WORD_VALUE
    value = pattern.match(text, start)
    return start, start if value is None else value.end(), ""
