"""Every test of the suites whose result differs with something around its application, and why it may.

A difference that is not listed fails the comparison, and so does one that is listed and is no longer seen.
"""

from typing import NamedTuple


class Exempt(NamedTuple):
    """Tests of `suite` whose id begins with `test`, under each of these injections."""

    suite: str
    injections: tuple[str, ...]
    test: str
    reason: str


EXCEPTIONS = (
    Exempt(
        "starlette", ("headers",), "tests/test_testclient.py::test_streaming_response_is_available_before_first_chunk",
        "`Conditional` makes an entity tag of the body: the head of a response without a length waits for its first "
        "part, which this test never lets come before the head.",
    ),
    Exempt(
        "fastapi", ("headers",), "tests/test_dependency_after_yield_streaming.py::test_broken_session_stream_no_raise",
        "The same: the stream fails before its first part, so that the head (200) has not left yet, and the client "
        "gets the 500 that it is.",
    ),
    # What the validator says of the suites is right: these tests, or what they test, break the protocol.
    Exempt(
        "starlette", ("validated",), "tests/test_requests.py::test_request_send_push_promise[",
        "The test's application offers itself the extension `http.response.push`, inside of the validator.",
    ),
    Exempt(
        "starlette", ("validated",), "tests/test_routing.py::test_base_route_middleware",
        "The test's middleware sends a header name with capitals (`X-Test`).",
    ),
    Exempt(
        "starlette", ("validated",), "tests/test_routing.py::test_mounted_middleware_does_not_catch_exception",
        "The test's middleware sends a header name with capitals (`X-Outer`).",
    ),
    Exempt(
        "starlette", ("validated",), "tests/test_routing.py::test_websocket_route_middleware",
        "The test's middleware accepts with a header name with capitals (`X-Test`).",
    ),
    Exempt(
        "starlette", ("validated",), "tests/test_testclient.py::test_incomplete_trailers",
        "The test leaves out the trailers that it has promised, and expects TestClient's own error for it.",
    ),
    Exempt(
        "starlette", ("validated",), "tests/test_testclient.py::test_invalid_trailer_sequence",
        "The test sends trailers out of order, and expects TestClient's own error for it.",
    ),
    Exempt(
        "starlette", ("validated",), "tests/test_websockets.py::test_receive_before_accept",
        "The test hands itself `websocket.connect` a second time.",
    ),
    Exempt(
        "starlette", ("validated",), "tests/test_websockets.py::test_receive_wrong_message_type",
        "The test sends the application a `websocket.send`.",
    ),
    Exempt(
        "fastapi", ("validated",), "tests/test_telemetry/test_data.py::test_request_objects_are_not_exported",
        "FastAPI closes a WebSocket whose parameters do not validate with a list as `reason`, where a string belongs.",
    ),
    Exempt(
        "fastapi", ("validated",), "tests/test_telemetry/test_websockets.py::test_validation_data",
        "The same.",
    ),
    Exempt(
        "fastapi", ("validated",),
        "tests/test_tutorial/test_websockets/test_tutorial002.py::test_websocket_invalid_data",
        "The same.",
    ),
    Exempt("fastapi", ("validated",), "tests/test_ws_router.py::test_depend_validation", "The same."),
    Exempt(
        "fastapi", ("validated",), "tests/test_ws_router.py::test_depend_err_middleware",
        "The test closes with code 1006, which stands in no close frame.",
    ),
    Exempt(
        "quart", ("validated",), "tests/test_basic.py::test_websocket",
        "Quart's test client sends what the test says without the `websocket.connect` that comes before.",
    ),
    Exempt("quart", ("validated",), "tests/test_testing.py::test_websocket_json", "The same."),
    Exempt(
        "litestar", ("stack", "headers"),
        "tests/unit/test_middleware/test_base_authentication_middleware.py"
        "::test_authentication_middleware_not_installed_raises_for_",
        "Where a policy authenticates, `request.user` and `request.auth` are there, and say that nobody is known.",
    ),
)  # fmt: skip


def unexplained(suite: str, injection: str, differing: set[str]) -> tuple[set[str], set[str]]:
    """What differs and is not listed, and what is listed and does not differ."""
    listed = [entry.test for entry in EXCEPTIONS if entry.suite == suite and injection in entry.injections]
    strangers = {test for test in differing if not any(test.startswith(name) for name in listed)}
    unseen = {name for name in listed if not any(test.startswith(name) for test in differing)}
    return strangers, unseen
