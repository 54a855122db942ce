"""Tells clients in time that a version of the API, or one route of it, will go, and answers 410 when it has gone.

    Versioning(versions={
        "v6": Version(phase="deprecated", deprecated=date(2026, 1, 11), sunset=date(2027, 1, 11), successor="v7"),
        "v7": Version(phase="current"),
        "v8": Version(phase="preview"),
    })

    GET /v6/agents?page=2       200
                                Deprecation: @1768089600
                                Sunset: Mon, 11 Jan 2027 00:00:00 GMT
                                Link: </v7/agents?page=2>; rel="successor-version"
    the same from 2027 on       410, a problem that names the successor

What it guarantees:

* Every response of a deprecated route says so, errors and refusals from further inside too. Nothing else about it
  changes.
* What the application says itself stands: its `Deprecation` and `Sunset` are kept, its `Link` is added to.
* The successor's link keeps path and query, percent-encoded; parameters that carry credentials are dropped (and the
  whole query beyond 1 KiB or 32 parameters).
* Versions are whole path segments: `/v6` never matches `/v60`.
* Wrong dates, unknown successors and missing dates fail at construction.

Place it outside everything that limits or authenticates, so that a retired route costs nothing.
RFC 9745 (Deprecation), RFC 8594 (Sunset), RFC 5829 and 8288 (Link), RFC 9110 section 15.5.11 (410).
"""

import re
from collections.abc import Mapping
from datetime import UTC, date, datetime
from functools import cached_property
from math import inf
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from sigil_policy.core.catalogue import VERSION_RETIRED
from sigil_policy.core.exchange import Exchange, Head
from sigil_policy.core.host import Resolution
from sigil_policy.core.marks import Marks
from sigil_policy.core.operations import Operation
from sigil_policy.core.policy import Listed, Policy
from sigil_policy.core.problems import Problem
from sigil_policy.core.routing import parse_route
from sigil_policy.telemetry.sensitive import SecretRules
from sigil_policy.wire.dates import format_http_date
from sigil_policy.wire.links import encode_path, link_value, query_without
from sigil_policy.wire.structured import sf_date

Pair = tuple[bytes, bytes]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._~-]*")
_PREFIX = re.compile(r"(?:/[A-Za-z0-9._~!$&'()+,;=:@%-]+)*")
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.:\[\]-]+")
# What is longer is left out of a link: proxies limit headers, and nobody makes us read for long.
_LONGEST_LINK = 2_000
_LONGEST_QUERY = 1_024
_MOST_PARAMETERS = 32
_LINK = ("What replaces this, and where to read about it (RFC 8288)", {"type": "string"})


def _moment(value: Any) -> Any:
    """A date is its first second in UTC; a time must say its offset."""
    if isinstance(value, str):
        try:
            value = date.fromisoformat(value) if len(value) == 10 else datetime.fromisoformat(value)
        except ValueError:
            raise ValueError(f"{value!r} is not an ISO 8601 date or time, like '2027-01-11'") from None
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise ValueError(
                f"{value.isoformat()} says no time zone; write datetime(..., tzinfo=UTC), or a date for midnight in UTC"
            )
        return value.astimezone(UTC)
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day, tzinfo=UTC)
    if value is not None:
        raise ValueError(f"a date or a time with its zone is needed, not {type(value).__name__}")
    return None


Moment = Annotated[datetime | date | None, BeforeValidator(_moment)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", hide_input_in_errors=True))
class Version:
    """Where a version, or a route, is in its life.

    Options:
        phase: "preview", "current" (default), "deprecated" or "retired". A deprecated one works as before; a retired
            one answers 410.
        deprecated: since when, or from when on; a date means its midnight in UTC. May lie in the future.
        sunset: when it will stop to work; not before `deprecated`. From then on it answers 410 in any phase.
        successor: what replaces it: the name of a version, or an absolute path. A route may name parameters of its own
            template ("/v7/agents/{name}/state") and may end in "/**" if the route does; or it is a URL of another
            origin, of the same forms.
        info: a document about the deprecation; linked in any phase.
        sunset_info: a document about the retirement policy; linked in any phase.
    """

    phase: Literal["preview", "current", "deprecated", "retired"] = "current"
    deprecated: Moment = None
    sunset: Moment = None
    successor: str | None = None
    info: str | None = None
    sunset_info: str | None = None

    @field_validator("info", "sunset_info")
    @classmethod
    def _is_reference(cls, target: str | None) -> str | None:
        if target is not None:
            link_value(target, "deprecation")
        return target

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.deprecated is not None and self.phase not in ("deprecated", "retired"):
            raise ValueError(
                f"phase {self.phase!r} has a date of deprecation; "
                "announce it with phase='deprecated' and a date in the future"
            )
        if self.deprecated is not None and self.sunset is not None and _stamp(self.sunset) < _stamp(self.deprecated):
            raise ValueError(
                f"sunset {self.sunset.isoformat()} is before deprecated {self.deprecated.isoformat()}; "
                "a sunset cannot be earlier (RFC 9745 section 4)"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", hide_input_in_errors=True))
class Deprecation(Version):
    """The same for one route: `phase` is "deprecated" unless it says otherwise."""

    phase: Literal["preview", "current", "deprecated", "retired"] = "deprecated"


def _stamp(moment: datetime | date) -> float:
    assert isinstance(moment, datetime)  # noqa: S101  what `_moment` made of it
    return moment.timestamp()


class _Successor(NamedTuple):
    """How a path of the route becomes one of its successor: captured segments by their place in `source`."""

    source: list[str | None]
    source_tail: bool
    parameters: bool
    target: tuple[str | int, ...]
    target_tail: bool
    origin: str

    def path(self, path: str) -> str | None:
        """The successor of `path`, under the same root; None if `path` is none of the route's."""
        segments = [segment for segment in path.split("/") if segment]
        source, length = self.source, len(self.source)
        places = range(len(segments) - length + 1) if self.source_tail else (len(segments) - length,)
        for at in places:
            there = segments[at : at + length] if at >= 0 else None
            if there == source or (there is not None and self.parameters and _fits(there, source)):
                break
        else:
            return None
        made = [] if self.origin else segments[:at]
        made += [segments[at + part] if isinstance(part, int) else part for part in self.target]
        if self.target_tail:
            made += segments[at + length :]
        # One leading slash: two would name another host (RFC 3986 section 4.2).
        end = "/" if made and path.endswith("/") and self.target_tail else ""
        return f"{self.origin}{encode_path('/' + '/'.join(made))}{end}"


def _fits(segments: list[str], source: list[str | None]) -> bool:
    return all(wanted is None or wanted == segment for segment, wanted in zip(segments, source, strict=True))


class _Notice(NamedTuple):
    """What responses of a route say, ready to append."""

    deprecation: Pair | None
    since: float
    sunset: Pair | None
    gone_from: float
    documents: tuple[bytes, ...]
    successor: _Successor | None
    subject: str


class Versioning(Policy):
    """Lifecycles of versions (`/v{n}/`) and of single routes.

    Options:
        versions: from the name, which is one path segment, to its `Version` (default: none).
        routes: from route to the `Deprecation` of that route; it replaces that of its version as a whole (default:
            none).
        prefix: what stands before the version in a path, for example "/api" (default "").
        deprecation_style: "rfc9745" (default: `@` and seconds since the epoch) or "literal" (`true`, from the date of
            deprecation on; the form of an expired draft that the guidelines show).
        after_sunset: "gone" (default) answers 410 once the sunset has passed; "pass" only announces it. A retired
            version answers 410 in any case.
        secret_parameters: names of query parameters that are left out of links, beside those that redaction hides in
            logs (default none).

    RFC 9745, RFC 8594, RFC 5829.
    """

    marks: ClassVar[frozenset[str]] = frozenset(("deprecated",))

    versions: Mapping[str, Version] = Field(default_factory=dict)
    routes: Mapping[str, Version] = Field(default_factory=dict)
    prefix: str = ""
    deprecation_style: Literal["rfc9745", "literal"] = "rfc9745"
    after_sunset: Literal["gone", "pass"] = "gone"
    secret_parameters: Listed[str] = ()

    @model_validator(mode="after")
    def _compile(self) -> Self:
        if not _PREFIX.fullmatch(self.prefix):
            raise ValueError(f"prefix {self.prefix!r} must be empty or a path without a slash at its end, like '/api'")
        known = set()
        for name in self.versions:
            if not _NAME.fullmatch(name):
                raise ValueError(f"version {name!r} must be one path segment, like 'v7'")
            known.add(parse_route(f"{self.prefix}/{name}/**"))
        for route in self.routes:
            if parse_route(route) in known:
                raise ValueError(f"route {route!r} is a version; describe it in versions")
        self._table, self._secrets  # noqa: B018  their faults are construction's
        return self

    @cached_property
    def _table(self) -> dict[str, _Notice | None]:
        table = {}
        for name, version in self.versions.items():
            route = f"{self.prefix}/{name}/**"
            table[route] = self._notice(route, version, f"Version {name} of this API", f"version {name!r}")
        for route, version in self.routes.items():
            table[route] = self._notice(route, version, "This operation", f"route {route!r}")
        return table

    def _notice(self, route: str, version: Version, subject: str, where: str) -> _Notice | None:
        deprecation, since = None, -inf
        if version.phase == "deprecated" and self.deprecation_style == "rfc9745" and version.deprecated is None:
            raise ValueError(
                f"{where} is deprecated, but not since when; give deprecated=date(...) (RFC 9745 section 2)"
            )
        if version.deprecated is not None and self.deprecation_style == "rfc9745":
            deprecation = (b"deprecation", sf_date(int(_stamp(version.deprecated))))
        elif version.phase in ("deprecated", "retired") and self.deprecation_style == "literal":
            deprecation = (b"deprecation", b"true")
            since = -inf if version.deprecated is None else _stamp(version.deprecated)
        sunset, gone_from = None, inf
        if version.sunset is not None:
            sunset = (b"sunset", format_http_date(_stamp(version.sunset)))
            if self.after_sunset == "gone":
                gone_from = _stamp(version.sunset)
        if version.phase == "retired":
            gone_from = -inf
        documents = []
        if version.info is not None:
            documents.append(link_value(version.info, "deprecation", media_type="text/html"))
        if version.sunset_info is not None:
            documents.append(link_value(version.sunset_info, "sunset", media_type="text/html"))
        successor = None if version.successor is None else self._successor(route, version.successor, where)
        if deprecation is None and sunset is None and not documents and gone_from == inf:
            return None
        return _Notice(deprecation, since, sunset, gone_from, tuple(documents), successor, subject)

    def _successor(self, route: str, successor: str, where: str) -> _Successor:
        found = _ORIGIN.match(successor)
        origin = found[0] if found else ""
        if found or successor.startswith("/"):
            written = successor[len(origin) :] or "/"
        else:
            written = self._in_version(route, successor, where)
        try:
            source, target = parse_route(route), parse_route(written)
        except ValueError as error:
            raise ValueError(f"{where}: successor: {error}") from None
        if target.tail and not source.tail:
            raise ValueError(f"{where}: successor {successor!r} ends in '**', but the route does not")
        parameters = [_parameter(part) for part in _parts(route)[: len(source.segments)]]
        made: list[str | int] = []
        for part in _parts(written)[: len(target.segments)]:
            name = _parameter(part)
            if name is not None and name not in parameters:
                raise ValueError(f"{where}: successor {successor!r} names {part}, which the route does not have")
            if "?" in part or "#" in part:
                raise ValueError(f"{where}: successor {successor!r} must be without '?' and '#'; queries are kept")
            made.append(part if name is None else parameters.index(name))
        return _Successor(list(source.segments), source.tail, None in source.segments, tuple(made), target.tail, origin)

    def _in_version(self, route: str, successor: str, where: str) -> str:
        """The same route below the version that is called `successor`."""
        if successor not in self.versions:
            known = ", ".join(self.versions) or "none"
            raise ValueError(
                f"{where}: successor {successor!r} is neither a known version ({known}) nor a path like '/v7/agents'"
            )
        parts, prefix = _parts(route), _parts(self.prefix)
        place = len(prefix)
        if parts[:place] != prefix or len(parts) <= place or parts[place] not in self.versions:
            raise ValueError(
                f"{where}: successor {successor!r} is a version, but the route is below none; name a path instead"
            )
        if parts[place] == successor:
            raise ValueError(f"{where} cannot be its own successor; name the version that replaces it")
        if self.versions[successor].phase == "retired":
            raise ValueError(f"{where}: successor {successor!r} is retired; name one that works")
        return "/" + "/".join((*prefix, successor, *parts[place + 1 :]))

    @cached_property
    def _secrets(self) -> SecretRules:
        return SecretRules(self.secret_parameters)

    def rules(self) -> Mapping[str, _Notice | None]:
        return self._table

    @cached_property
    def _of_routes(self) -> frozenset[int]:
        """The notices of single routes, by identity: stronger than what an endpoint says, and versions are weaker."""
        return frozenset(id(self._table[route]) for route in self.routes)

    def marked(self, marks: Marks, rule: Any, resolution: Resolution) -> Any:
        if marks.deprecated is None or (rule is not None and id(rule) in self._of_routes):
            return rule
        if not isinstance(marks.deprecated, Version):
            raise ValueError(f"deprecated= takes a Deprecation(...), not {type(marks.deprecated).__name__}")
        route = resolution.template or "/"
        return self._notice(route, marks.deprecated, "This operation", f"endpoint of {route!r}")

    def describe(self, operation: Operation, rule: _Notice | None) -> None:
        if rule is None:
            return
        if rule.deprecation is not None:
            operation.deprecated = True
            operation.sends("Deprecation", "Since when this is deprecated (RFC 9745)")
        if rule.sunset is not None:
            operation.sends("Sunset", "When this will stop to work (RFC 8594)")
        if rule.documents or rule.successor is not None:
            operation.sends("Link", *_LINK)
        if rule.gone_from < inf:
            operation.answers(VERSION_RETIRED, headers={"Link": _LINK})

    def on_request(self, ex: Exchange) -> Problem | None:
        notice: _Notice | None = ex.rule(self)
        if notice is None or ex.started < notice.gone_from:
            return None
        reference = self._reference(ex, notice)
        headers: list[Pair] = []
        self._announce(ex, notice, reference, headers)
        detail = f"{notice.subject} is no longer available."
        if reference is None:
            return VERSION_RETIRED(detail, headers=headers, hints=("Use another version of this API",))
        return VERSION_RETIRED(detail, headers=headers, successor=reference)

    def on_response(self, ex: Exchange, head: Head) -> None:
        notice: _Notice | None = ex.rule(self)
        if notice is not None:
            self._announce(ex, notice, self._reference(ex, notice), head.headers)

    def _announce(self, ex: Exchange, notice: _Notice, reference: str | None, headers: list[Pair]) -> None:
        """Append what `headers` do not say yet: the fields are singletons, and a stack may hold this policy twice."""
        present = {name for name, _ in headers}
        if notice.deprecation is not None and ex.started >= notice.since and b"deprecation" not in present:
            headers.append(notice.deprecation)
        if notice.sunset is not None and b"sunset" not in present:
            headers.append(notice.sunset)
        links = notice.documents
        if reference is not None:
            links = (b'<%b>; rel="successor-version"' % reference.encode("ascii"), *links)
        if b"link" in present:
            said = [value for name, value in headers if name == b"link"]
            links = tuple(link for link in links if not any(link in value for value in said))
        if links:
            headers.append((b"link", b", ".join(links)))

    def _reference(self, ex: Exchange, notice: _Notice) -> str | None:
        """Where the successor is, for this path and query; without the query, or None, if it were too long to send."""
        if notice.successor is None or len(ex.path) > _LONGEST_LINK:
            return None
        path = notice.successor.path(ex.path)
        if path is None or len(path) > _LONGEST_LINK:
            return None
        raw = ex.query
        if raw and len(raw) <= _LONGEST_QUERY and raw.count(b"&") + raw.count(b";") < _MOST_PARAMETERS:
            query = query_without(raw, self._is_secret)
            if query and len(path) + len(query) < _LONGEST_LINK:
                return f"{path}?{query}"
        return path

    def _is_secret(self, name: str, value: str) -> bool:
        text = f"{name}={value}"
        return self._secrets.is_secret(name) or self._secrets.scrub(text) != text


def _parts(route: str) -> list[str]:
    """The segments of a route as they are written."""
    return [part for part in route.partition("/")[2].split("/") if part]


def _parameter(part: str) -> str | None:
    """The name of the parameter that a segment is, or None."""
    return part[1:-1].partition(":")[0] if part.startswith("{") else None
