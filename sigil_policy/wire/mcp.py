"""What a request to an MCP endpoint says in its headers and in its body (MCP 2026-07-28, Streamable HTTP).

    read_message(b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"search"}}')
                                            # Message(method="tools/call", name="search", id=1, ...)
    decode_value(b"=?base64?c2VhcmNo?=")    # "search"
    has_mirrored_headers(b"2026-07-28")     # True

Headers mirror the body for those who do not read it; the server executes the body. JSON-RPC 2.0, RFC 8259.
"""

import re
from base64 import b64decode
from typing import Any, NamedTuple

from sigil_policy.wire.strict_json import DECODER

MOST_CONTAINERS = 20_000
"""Objects and arrays in one message, at most: they are what takes long to read for its length."""

# The member of `params` that Mcp-Name mirrors.
_NAMED = {"tools/call": "name", "prompts/get": "name", "resources/read": "uri"}
_READ = frozenset(("jsonrpc", "id", "method", "params", "name", "uri"))
_LONGEST_ID = 256
_LARGEST_ID = 2**63

_VERSION = re.compile(rb"\d{4}-\d{2}-\d{2}")
_FIRST_MIRRORED = b"2026-07-28"
_ENCODED = re.compile(rb"=\?base64\?([A-Za-z0-9+/]*={0,2})\?=")
_PLAIN = re.compile(rb"[\x20-\x7e]*")
_META_VERSION = "io.modelcontextprotocol/protocolVersion"


class Message(NamedTuple):
    """A JSON-RPC message: `method` is None for a response; `name` is the tool, prompt or URI that it names, if any.

    `id` is None for a notification. `version` is the protocol version that `_meta` tells.
    """

    method: str | None
    name: str | None
    id: str | int | None
    version: Any = None


class NotOneMessageError(ValueError):
    """Well-formed JSON that is no single message: a batch, a text, a number."""


def takes_name(method: str | None) -> bool:
    """Whether a request of this method names something in `Mcp-Name`."""
    return method in _NAMED


def has_mirrored_headers(version: bytes | None) -> bool:
    """Whether `MCP-Protocol-Version` is one that requires `Mcp-Method` and `Mcp-Name`, and servers to compare them."""
    return version is not None and _VERSION.fullmatch(version) is not None and version >= _FIRST_MIRRORED


def decode_value(field: bytes) -> str:
    """The value of `Mcp-Name`, which may be wrapped in Base64. `ValueError` for characters that it cannot have."""
    if _PLAIN.fullmatch(field) is None:
        raise ValueError("not a plain ASCII value")
    wrapped = _ENCODED.fullmatch(field)
    return field.decode("ascii") if wrapped is None else b64decode(wrapped[1], validate=True).decode("utf-8")


def read_message(body: bytes) -> Message:
    """The message in a request body: UTF-8, one JSON object, no member twice (parsers differ in which of two holds),
    and none of those that count in another case (some parsers see no difference).

    `NotOneMessageError` for other JSON, `ValueError` for what is no JSON or has too many objects and arrays.
    """
    if body.count(b"{") + body.count(b"[") > MOST_CONTAINERS:
        raise ValueError("too many objects and arrays")
    try:
        value = DECODER.decode(body.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError:
        raise ValueError("not strict JSON") from None
    if not isinstance(value, dict):
        raise NotOneMessageError("not one message")
    method, params, given = value.get("method"), value.get("params"), value.get("id")
    if not isinstance(method, str):
        if "method" in value:
            raise NotOneMessageError("the method is no text")
        method = None
    if "id" in value and not _is_id(given) and not (given is None and method is None):
        raise NotOneMessageError("the id is none")
    members = params if isinstance(params, dict) else {}
    if any(name not in _READ and name.casefold() in _READ for name in (*value, *members)):
        raise NotOneMessageError("a member is one that is read, but for its case")
    name = members.get(_NAMED.get(method or "", ""))
    meta = members.get("_meta")
    return Message(
        method,
        name if isinstance(name, str) else None,
        given,
        meta.get(_META_VERSION) if isinstance(meta, dict) else None,
    )


def _is_id(value: Any) -> bool:
    """A text or an integer, of a length that an answer may repeat."""
    if isinstance(value, str):
        return len(value) <= _LONGEST_ID
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _LARGEST_ID
