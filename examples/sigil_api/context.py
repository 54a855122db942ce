"""What the endpoints share: the opened storage, the caller's request id, the fields of a cacheable answer."""

from datetime import datetime
from email.utils import format_datetime
from typing import Annotated
from urllib.parse import urlencode

from fastapi import Depends, Request, Response

from examples.sigil_api.models import Metadata, Pagination, RunMetadata, TokensUsed
from examples.sigil_api.problems import OrchestratorNotReady
from examples.sigil_api.storage import Storage
from sigil_policy import Correlation, get_exchange


async def _storage(request: Request) -> Storage:
    storage = getattr(request.state, "storage", None)
    if not isinstance(storage, Storage):
        raise OrchestratorNotReady(detail="The service has not finished starting", headers=((b"retry-after", b"1"),))
    return storage


Store = Annotated[Storage, Depends(_storage)]
"""The storage that the lifespan opened; 503 before that."""


def request_id(request: Request) -> str:
    return get_exchange(request)[Correlation].request_id


def latency_ms(request: Request) -> int:
    exchange = get_exchange(request)
    return round((exchange.clock.monotonic() - exchange.started_monotonic) * 1000)


def metadata(request: Request) -> Metadata:
    return Metadata(request_id=request_id(request), latency_ms=latency_ms(request))


def run_metadata(request: Request, used: TokensUsed) -> RunMetadata:
    return RunMetadata(request_id=request_id(request), latency_ms=latency_ms(request), tokens_used=used)


def last_modified(response: Response, at: datetime) -> None:
    response.headers["Last-Modified"] = format_datetime(at.replace(microsecond=0), usegmt=True)


def location(request: Request, response: Response, path: str) -> None:
    """Where the new resource is, under the version that was asked."""
    root = request.scope.get("root_path", "")
    version = request.url.path.removeprefix(root).split("/", 2)[1]
    response.headers["Location"] = f"{root}/{version}{path}"


def page_links(request: Request, response: Response, pagination: Pagination, known: frozenset[str]) -> None:
    """`Link` beside the body's pagination (RFC 8288): the same question, another page."""
    asked = [(key, value) for key, value in request.query_params.multi_items() if key in known and key != "page"]
    last = max(pagination.total_pages, 1)
    pages = {"first": 1, "prev": pagination.page - 1, "next": pagination.page + 1, "last": last}
    links = [
        f'<{request.url.path}?{urlencode([*asked, ("page", page)])}>; rel="{relation}"'
        for relation, page in pages.items()
        if 1 <= page <= last
    ]
    response.headers["Link"] = ", ".join(links)
