"""The C parser of RESP, loaded on first use of a Redis store: `pip install 'sigil-policy[redis]'`."""

from collections.abc import Callable
from typing import Any, Final

try:
    from hiredis import ProtocolError, Reader, ReplyError, pack_command
except ImportError:
    raise ImportError("a store on a Redis or Valkey server needs an extra: pip install 'sigil-policy[redis]'") from None

pack: Callable[[tuple[Any, ...]], bytes] = pack_command
"""A command and its arguments (bytes, str, int, float) as they go over the wire."""

__all__ = ["MORE", "ProtocolError", "Reader", "ReplyError", "pack"]

MORE: Final = object()
"""What the reader answers when the next reply is not complete yet."""
