"""What policies say of an endpoint, for its documentation.

    class Greeting(Policy):
        def describe(self, operation: Operation, rule: Any) -> None:
            operation.sends("Greeting", "Says hello", required=True)
            operation.answers(TOO_COLD, headers=("Retry-After",))

The policies of a stack are asked outermost first, as an exchange meets them: what an outer one has said may be read.
What a policy answers carries the header fields of those outside of it, and of no other, as on the wire.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sigil_policy.core.problems import DEFAULT_STYLE, ProblemStyle, ProblemType

INSIDE = 1_000_000
"""The place of what the application itself sends: inside of every policy."""

_TEXT: Mapping[str, Any] = {"type": "string"}


def is_success(status: int) -> bool:
    return 200 <= status < 300 or status == 304


@dataclass(frozen=True, slots=True)
class Field:
    """A header field of responses: `when` says of which status, `required` that all of those have it."""

    name: str
    description: str
    schema: Mapping[str, Any]
    when: Callable[[int], bool]
    required: bool
    place: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """A problem that may be the answer, with header fields of its own and an example of its further members."""

    kind: ProblemType
    headers: Mapping[str, tuple[str, Mapping[str, Any]]]
    members: Mapping[str, Any]
    style: ProblemStyle
    place: int


@dataclass(frozen=True, slots=True)
class Credential:
    """A way to say who calls: `scheme` as OpenAPI writes it; `issuers` is None where no token vouches."""

    name: str
    scheme: Mapping[str, Any]
    kind: str
    issuers: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """An operation that a policy answers by itself: `written` is what OpenAPI writes of it."""

    method: str
    path: str
    written: Mapping[str, Any]


@dataclass(slots=True)
class Operation:
    """One method of one path, and what the policies around it have said so far.

    `takes_input` says that something of the request is validated. `public` is set by who lets anybody pass, `requires`
    (a requirement) by who takes a caller, and `required` by an authentication that refuses who has no credential.
    `answered` is set by a policy that answers by itself: those further in are not asked.
    """

    method: str
    path: str
    takes_input: bool = False
    public: bool = False
    required: bool = False
    requires: Any = None
    deprecated: bool = False
    answered: bool = False
    validation: ProblemType | None = None
    style: ProblemStyle = DEFAULT_STYLE
    place: int = 0
    credentials: list[Credential] = field(default_factory=list)
    fields: list[Field] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    statuses: dict[int, str] = field(default_factory=dict)

    def sends(
        self,
        name: str,
        description: str,
        schema: Mapping[str, Any] = _TEXT,
        *,
        when: Callable[[int], bool] | None = None,
        required: bool = False,
    ) -> None:
        """Responses have the header field `name`; `when` is asked with a status (default: all of them)."""
        self.fields.append(Field(name, description, schema, when or _always, required, self.place))

    def answers(
        self,
        *kinds: ProblemType,
        headers: Sequence[str] | Mapping[str, tuple[str, Mapping[str, Any]]] = (),
        inside: bool = False,
        **members: Any,
    ) -> None:
        """Any of `kinds` may be the answer, with these `headers` of its own, and `members` in its example.

        `headers` are names, or maps them to what they mean and to their schemas. `inside` says that the answer comes
        from the application.
        """
        named = (
            headers if isinstance(headers, Mapping) else {name: _MEANINGS.get(name, ("", _TEXT)) for name in headers}
        )
        place = INSIDE if inside else self.place
        self.refusals += [Refusal(kind, named, members, self.style, place) for kind in kinds]

    def accepts(
        self, name: str, scheme: Mapping[str, Any], *, kind: str, issuers: frozenset[str] | None = None
    ) -> None:
        """A caller may present this credential."""
        self.credentials.append(Credential(name, scheme, kind, issuers))


def _always(status: int) -> bool:
    return True


_MEANINGS = {
    "Retry-After": (
        "Seconds after which another try is worth it (RFC 9110 section 10.2.3)",
        {"type": "integer", "minimum": 1},
    ),
    "WWW-Authenticate": ("How to authenticate (RFC 9110 section 11.6.1)", _TEXT),
}
