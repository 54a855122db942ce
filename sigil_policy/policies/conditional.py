"""ETags and 304 for every complete GET: clients that have a response already do not get it again.

    app.add_middleware(PolicyStack, policies=[..., CacheControl(routes={...}), Conditional()])

    GET /v7/agents                                  200, ETag: "2c26b46b68ffc68ff99b453c1d304134"
    GET /v7/agents, If-None-Match: "2c26b46b..."    304, no body

What it guarantees:

* A strong ETag, the same from every worker, on each complete 200 of GET and HEAD within `bound`. The application's own
  ETag and Last-Modified are never overwritten, and are evaluated just the same.
* If-None-Match first (lists, weak comparison, `*`), If-Modified-Since only without it; a field that is malformed
  answers 200. A 304 keeps every header but those that describe the missing content.
* Streams, event streams, files sent by the server, 206, errors and other methods pass untouched and undelayed. A body
  whose length is unknown is waited for no further than its first message.
* Last-Modified is never later than now.

Place it innermost: CacheControl and all others then decorate 200 and 304 alike. The body must be the same for the same
state: an id or a time in it makes every response a new one. A layer that compresses may be on either side: what a
client accepts is part of the tag, so that two codings never share a strong one.

RFC 9110 sections 8.8, 13.1.2, 13.1.3, 13.2.2, 15.4.5.
"""

from binascii import hexlify
from collections.abc import Callable
from functools import cached_property
from hashlib import sha256
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from sigil_policy.core.exchange import Exchange, Head
from sigil_policy.core.operations import Operation
from sigil_policy.core.policy import Policy
from sigil_policy.wire.dates import format_http_date, parse_http_date
from sigil_policy.wire.etags import coding_variant, is_etag, lists_weakly

Digest = Callable[[bytes], bytes | str]

# A 304 has no content to describe (section 15.4.5); Content-Digest (RFC 9530) would be that of an empty one.
_OF_CONTENT = (
    b"content-type",
    b"content-length",
    b"content-encoding",
    b"content-language",
    b"content-range",
    b"content-digest",
)


def _has_tag(status: int) -> bool:
    return status in (200, 304)


def _sha256(body: bytes) -> bytes:
    # 128 bits are beyond accident and beyond a second preimage.
    return hexlify(sha256(body).digest()[:16])


class Conditional(Policy):
    """Gives complete responses an ETag and answers 304 where the client has them already.

        Conditional()
        Conditional(bound=1_000_000, digest=xxhash.xxh3_128_digest)

    Options:
        bound: bytes of a body that is hashed (default 65536). SHA-256 of 64 KiB takes some 40 to 160 µs, and nothing
            else runs meanwhile: raise it only with a faster `digest`.
        weak: mark the tags that are made here as weak (default False): the body's meaning is the same, its bytes may
            differ.
        digest: "sha256" (default), or a function from the body to bytes, or to text of the characters of an ETag.
            One that is not collision-resistant is for bodies that no attacker shapes.

    RFC 9110 sections 8.8.3 and 13.
    """

    bound: Annotated[int, Field(ge=0)] = 65_536  # type: ignore[misc]  # `Policy.bound` may be made a field
    weak: bool = False
    digest: Literal["sha256"] | Digest = "sha256"

    @field_validator("digest")
    @classmethod
    def _makes_tags(cls, digest: Literal["sha256"] | Digest) -> Literal["sha256"] | Digest:
        if callable(digest):
            made = digest(b"")
            if not isinstance(made, bytes | str):
                raise ValueError(
                    f"digest must return bytes or str, not {type(made).__name__}; "
                    "for a hashlib constructor write digest=lambda body: hashlib.blake2b(body).digest()"
                )
            if isinstance(made, str) and not is_etag(f'"{made}"'.encode("latin-1", "replace")):
                raise ValueError("digest returns text that cannot stand in an ETag: no spaces, no quotes, only ASCII")
            if digest(b"a") == digest(b"b"):
                raise ValueError("digest returns the same for different bodies")
        return digest

    @cached_property
    def _opaque(self) -> Callable[[bytes], bytes]:
        digest = self.digest
        if not callable(digest):
            return _sha256

        def opaque(body: bytes) -> bytes:
            made = digest(body)
            return hexlify(made) if isinstance(made, bytes) else made.encode("latin-1")

        return opaque

    def describe(self, operation: Operation, rule: Any) -> None:
        if operation.method in ("GET", "HEAD"):
            operation.sends("ETag", "Names what was sent: give it back as If-None-Match (RFC 9110)", when=_has_tag)
            operation.statuses[304] = "What the client has is still the same (RFC 9110 section 15.4.5)"

    def wants_body(self, ex: Exchange, head: Head) -> bool:
        return head.status == 200 and (ex.method == "GET" or ex.method == "HEAD")

    def on_body(self, ex: Exchange, head: Head, body: bytes) -> bytes | None:
        fields, headers = dict(head.headers), ex.headers
        tag = fields.get(b"etag")
        # A HEAD without content says nothing of the content that GET would have.
        if tag is None and (body or ex.method == "GET" or fields.get(b"content-length") == b"0"):
            opaque = self._opaque(body)
            if b"accept-encoding" in headers and b"content-encoding" not in fields:
                opaque += coding_variant(headers[b"accept-encoding"])
            tag = b'W/"%b"' % opaque if self.weak else b'"%b"' % opaque
            head.headers.append((b"etag", tag))
        # Section 13.2.2: If-None-Match decides where it is present, else If-Modified-Since.
        if b"if-none-match" in headers:
            listed = headers[b"if-none-match"]
            known = listed.strip(b" \t") == b"*" or (tag is not None and lists_weakly(listed, tag))
        elif b"if-modified-since" in headers and b"last-modified" in fields:
            now = ex.clock.time()
            since = parse_http_date(headers[b"if-modified-since"], now=now)
            changed = parse_http_date(fields[b"last-modified"], now=now)
            known = since is not None and changed is not None and min(changed, int(now)) <= since
        else:
            return None
        if not known:
            return None
        head.status = 304
        head.remove(*_OF_CONTENT)
        if tag is not None:
            head.remove(b"last-modified")
        return b""

    def on_response(self, ex: Exchange, head: Head) -> None:
        """Section 8.8.2.1: an origin server with a clock never says that something changed later than now."""
        status = head.status
        if not (200 <= status < 300 or status == 304):
            return
        for name, value in head.headers:
            if name == b"last-modified":
                now = ex.clock.time()
                changed = parse_http_date(value, now=now)
                if changed is not None and changed > now:
                    head.replace(name, format_http_date(now))
                return
