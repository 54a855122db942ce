"""HTTP/2 spoken by hand over TLS: WebSockets in a stream of it (RFC 8441), which no client library here has."""

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import h2.config
import h2.connection
import h2.events
import h2.settings
from wsproto.connection import Connection, ConnectionType
from wsproto.events import CloseConnection, Event, TextMessage

SECONDS = 60


class Http2:
    """One connection; one thing at a time on it."""

    def __init__(self, port: int, authority: Path) -> None:
        context = ssl.create_default_context(cafile=str(authority))
        context.set_alpn_protocols(["h2"])
        plain = socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
        self._socket = context.wrap_socket(plain, server_hostname="localhost")
        self.chosen = self._socket.selected_alpn_protocol()
        self._speaks = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self._speaks.initiate_connection()
        self._flush()
        self._waiting: list[Any] = []
        self._hear(h2.events.RemoteSettingsChanged)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    @property
    def has_websockets(self) -> bool:
        """RFC 8441 section 3."""
        return bool(self._speaks.remote_settings.enable_connect_protocol)

    def _flush(self) -> None:
        self._socket.sendall(self._speaks.data_to_send())

    def _hear(self, *kinds: type) -> Any:
        """The next event of one of `kinds`."""
        while True:
            for event in self._waiting:
                if isinstance(event, kinds):
                    del self._waiting[: self._waiting.index(event) + 1]
                    return event
            data = self._socket.recv(65_536)
            assert data, f"the server has closed the connection; heard: {self._waiting}"
            self._waiting += self._speaks.receive_data(data)
            self._flush()

    def connect(self, path: str, **headers: str) -> "Stream":
        """A handshake (RFC 8441 section 5)."""
        number = self._speaks.get_next_available_stream_id()
        pseudo = {":method": "CONNECT", ":protocol": "websocket", ":scheme": "https", ":path": path}
        fields = {**pseudo, ":authority": "localhost", "sec-websocket-version": "13", **headers}
        self._speaks.send_headers(number, list(fields.items()))
        self._flush()
        answer = self._hear(h2.events.ResponseReceived)
        assert answer.stream_id == number
        return Stream(self, number, dict(answer.headers))


class Stream:
    """What came of a handshake: a refusal to read, or a WebSocket."""

    def __init__(self, connection: Http2, number: int, headers: dict[str, str]) -> None:
        self.headers = headers
        self.status = int(headers[":status"])
        self._connection = connection
        self._number = number
        self._frames = Connection(ConnectionType.CLIENT)

    def _data(self) -> Iterator[bytes]:
        while True:
            event = self._connection._hear(h2.events.DataReceived, h2.events.StreamEnded, h2.events.StreamReset)
            if not isinstance(event, h2.events.DataReceived):
                return
            yield event.data

    def body(self) -> bytes:
        return b"".join(self._data())

    def say(self, text: str) -> None:
        self._connection._speaks.send_data(self._number, self._frames.send(TextMessage(text)))
        self._connection._flush()

    def hear(self) -> Event:
        """The next message, or the close frame."""
        for data in self._data():
            self._frames.receive_data(data)
            for event in self._frames.events():
                if isinstance(event, TextMessage | CloseConnection):
                    return event
        raise AssertionError("the stream has ended without a close frame")
