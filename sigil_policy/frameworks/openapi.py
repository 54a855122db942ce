"""The OpenAPI document of a FastAPI application says what its policies do.

    app = FastAPI()
    app.add_middleware(PolicyStack, policies=[RequestID(), Problems(), BearerAuth(...), Scopes(...), RateLimit()])
    enrich_openapi(app)

    @app.get("/v7/agents/{name}", responses=problem_responses(AgentNotFound))
    async def show(name: str) -> Agent: ...

    python -m sigil_policy.frameworks.openapi package.module:app        # prints the document

What is added, each from the policy that does it (`Policy.describe`; your own policies may have one too):

* `components.securitySchemes`, and for each operation its `security` with scopes, as its rule in `Scopes` says: one of
  several requirements is one of several entries, both together are one entry, and public routes have `[]`;
* what may be answered instead: problems by `$ref` to shared responses, each with an example, the header fields that it
  really has, and the schema `Problem` (RFC 9457 with the guidelines' members);
* the header fields of the application's own responses, `304` where a GET is conditional, `deprecated: true`;
* FastAPI's 422 with `HTTPValidationError` is the problem that `Problems` makes of it, with its `validation_status`.

What it guarantees:

* What the application has declared stays as it is: a response, a security requirement, a header field, a component. (A
  response gets the header fields that it does not name.) Only FastAPI's own 422 is replaced.
* `app.openapi` is wrapped as it is found, and `openapi_schema` is left to FastAPI: routes that are added later are in
  the document, and an application that makes its own document keeps it. Twice is once.
* Nothing is asked of a store, and no secret is in it.

The document is made when it is first asked for, which takes about as long as FastAPI's own; `app.openapi()` at startup
makes it before the first request. Call `enrich_openapi` once, after an `app.openapi` of your own is set; for a stack
that is put around the application, `enrich_openapi(PolicyStack(app, [...]))`. Applications that are mounted have
documents of their own. OpenAPI 3.1; in a document of 3.0 the scopes of keys and plain tokens are left out, because it
has no place for them.
"""

import json
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from importlib import import_module
from itertools import product
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.routing import iter_route_contexts

from sigil_policy.core.catalogue import CREDENTIALS_MISSING, SCOPE_INSUFFICIENT
from sigil_policy.core.host import Resolution
from sigil_policy.core.operations import INSIDE, Credential, Field, Operation, Refusal, Served
from sigil_policy.core.policy import Policy
from sigil_policy.core.problems import DEFAULT_STYLE, ProblemStyle, ProblemType, registered_types
from sigil_policy.core.stack import PolicyStack
from sigil_policy.frameworks.chain import chain
from sigil_policy.frameworks.routes import is_known
from sigil_policy.identity.requirements import AllOf, AnyOf, Both, Either, FromApiKey, FromIssuer, Requirement

App = TypeVar("App")
Alternatives = list[dict[str, list[str]]]

OWN_SCHEMES: dict[str, Mapping[str, Any]] = {}
"""What `sigil_policy.frameworks.fastapi` documents before it is known which policies there are."""

_MARK = "__sigil_enriched__"
_CODES = "x-problem-codes"
_METHODS = ("get", "put", "post", "delete", "options", "head", "patch", "trace", "query")
_MOST_ALTERNATIVES = 64
_DEFAULTS = ("HTTPValidationError", "ValidationError")

_PROBLEM: Mapping[str, Any] = {
    "type": "object",
    "title": "Problem",
    "description": "What went wrong, and what helps (RFC 9457)",
    "required": ["type", "title", "status", "instance", "error_code", "timestamp", "recovery_hints"],
    "properties": {
        "type": {"type": "string", "format": "uri", "description": "Names the kind of problem"},
        "title": {"type": "string", "description": "The same for every occurrence of the kind"},
        "status": {"type": "integer", "minimum": 400, "maximum": 599},
        "detail": {"type": "string", "description": "What went wrong this time"},
        "instance": {"type": "string", "format": "uri-reference", "description": "Where it went wrong"},
        "error_code": {"type": "string", "pattern": "^[A-Z]+(_[A-Z]+)*_[0-9]{3}$"},
        "timestamp": {"type": "string", "format": "date-time"},
        "request_id": {"type": "string", "description": "Give it when you report this problem"},
        "trace_id": {"type": "string"},
        "recovery_hints": {"type": "array", "items": {"type": "string"}},
        "validation_errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["field", "message"],
                "properties": {"field": {"type": "string"}, "message": {"type": "string"}},
            },
        },
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["detail"],
                "properties": {
                    "detail": {"type": "string"},
                    "pointer": {"type": "string", "description": "Where in the body (RFC 6901)"},
                    "parameter": {"type": "string"},
                    "in": {"type": "string"},
                },
            },
        },
        "retry_after": {"type": "integer", "minimum": 1},
    },
}


def enrich_openapi(app: App) -> App:
    """Make the OpenAPI document of `app` say what the policies around it do; returns `app`.

        app = enrich_openapi(FastAPI())

    `app` is a FastAPI application, or a `PolicyStack` around one. Raises `TypeError` for anything else.
    """
    stack = app if isinstance(app, PolicyStack) else None
    api = find_api(app)
    wrapped = api.openapi
    outer: list[PolicyStack] | None = getattr(wrapped, _MARK, None)
    if outer is not None:
        if stack is not None and all(one is not stack for one in outer):
            outer.insert(0, stack)
        return app
    outside = [] if stack is None else [stack]
    known: list[Any] = [None, None, None]

    def openapi() -> dict[str, Any]:
        base = wrapped()
        mounted = [*outside, api.middleware_stack, *api.user_middleware]
        # FastAPI hands out one and the same document until routes change.
        if known[0] is not base or len(known[1]) != len(mounted) or any(map(_differ, known[1], mounted)):
            known[:] = base, mounted, _enriched(api, base, [*outside, *_stacks(api)])
        document: dict[str, Any] = known[2]
        return document

    setattr(openapi, _MARK, outside)
    api.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend it
    return app


def problem_responses(*kinds: ProblemType) -> dict[int | str, dict[str, Any]]:
    """For FastAPI's `responses=`: the problems that an endpoint raises itself.

        @app.get("/v7/agents/{name}", responses=problem_responses(AgentNotFound))

    With `enrich_openapi` they are documented as all others are.
    """
    found: dict[int | str, dict[str, Any]] = {}
    for kind in kinds:
        response = found.setdefault(kind.status, {"description": kind.title, _CODES: []})
        if kind.code not in response[_CODES]:
            response[_CODES].append(kind.code)
    return found


def find_api(app: Any) -> FastAPI:
    """The FastAPI application that `app` is, or leads to."""
    for inner in chain(app, is_known):
        if isinstance(inner, FastAPI):
            return inner
    raise TypeError(f"an OpenAPI document is made for a FastAPI application, not for {type(app).__name__}")


def _differ(one: object, other: object) -> bool:
    return one is not other


# --- who is asked ----------------------------------------------------------------------------------------------------


def _stacks(api: FastAPI) -> Iterator[PolicyStack]:
    """The stacks that are mounted on `api`, outermost first."""
    if api.middleware_stack is None:
        # It has not started. What is made here serves nobody, and is forgotten.
        for one in api.user_middleware:
            if isinstance(one.cls, type) and issubclass(one.cls, PolicyStack):
                make: Callable[..., PolicyStack] = one.cls
                yield make(api, *one.args, **one.kwargs)
        return
    yield from (inner for inner in chain(api.middleware_stack, is_known) if isinstance(inner, PolicyStack))


class _Around:
    """The policies around one application, and what each has to say of an operation."""

    def __init__(self, api: FastAPI, stacks: Sequence[PolicyStack]) -> None:
        self.stacks = stacks
        self.endpoints: dict[tuple[str, str], Any] = {}
        for context in iter_route_contexts(api.routes):
            for method in getattr(context, "methods", None) or ():
                template = getattr(context, "path_format", None)
                if template is not None:
                    self.endpoints.setdefault((template, method), getattr(context, "endpoint", None))
        self.resolutions: list[dict[tuple[str | None, int], Resolution]] = [
            {(found.template, id(found.endpoint)): found for found in stack.host.endpoints()} for stack in stacks
        ]

    def describe(self, operation: Operation) -> None:
        endpoint = self.endpoints.get((operation.path, operation.method))
        for stack, resolutions in zip(self.stacks, self.resolutions, strict=True):
            found = {} if stack.matcher is None else stack.matcher.match(operation.method, operation.path)
            resolution = resolutions.get((operation.path, id(endpoint)))
            for policy in stack.policies:
                operation.place += 1
                policy.describe(operation, _rule(policy, found.get(id(policy)), resolution))
                if operation.answered:
                    return

    def served(self) -> Iterator[Served]:
        for stack in self.stacks:
            for policy in stack.policies:
                yield from policy.serves()


def _rule(policy: Policy, rule: Any, resolution: Resolution | None) -> Any:
    if resolution is None or resolution.marks is None or not policy.marks:
        return rule
    return policy.marked(resolution.marks, rule, resolution)


# --- the document ----------------------------------------------------------------------------------------------------


def _enriched(api: FastAPI, base: Mapping[str, Any], stacks: Sequence[PolicyStack]) -> dict[str, Any]:
    document: dict[str, Any] = deepcopy(dict(base))
    around = _Around(api, stacks)
    components = _Components(document)
    for served in around.served():
        item = document.setdefault("paths", {}).setdefault(served.path, {})
        item.setdefault(served.method.lower(), deepcopy(dict(served.written)))
    for path, item in (document.get("paths") or {}).items():
        for method in _METHODS:
            written = item.get(method) if isinstance(item, dict) else None
            if isinstance(written, dict):
                takes_input = bool(written.get("parameters") or written.get("requestBody") or item.get("parameters"))
                operation = Operation(method.upper(), path, takes_input)
                around.describe(operation)
                _Writer(written, operation, components).write()
    components.tidy()
    return document


class _Components:
    """The shared parts of a document: what is the same has one name, and names that are taken stay what they are."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.parts: dict[str, dict[str, Any]] = document.get("components") or {}
        self.had = "components" in document
        # Replaced by what the policies say, where they say something.
        schemes = self.parts.get("securitySchemes") or {}
        self.provisional = {name for name, scheme in schemes.items() if scheme == OWN_SCHEMES.get(name)}
        self.replaced: set[str] = set()

    def put(self, kind: str, name: str, content: Mapping[str, Any]) -> str:
        """The name under which `content` is known from now on: `name`, or with a number behind it."""
        known = self.parts[kind] = self.parts.get(kind) or {}
        chosen, number = name, 1
        while chosen in known and known[chosen] != content:
            number += 1
            chosen = f"{name}-{number}"
        known.setdefault(chosen, content)
        return chosen

    def reference(self, kind: str, name: str, content: Mapping[str, Any]) -> dict[str, str]:
        return {"$ref": f"#/components/{kind}/{self.put(kind, name, content)}"}

    def scheme(self, credential: Credential) -> str:
        name = credential.name
        if name in self.provisional and name not in self.replaced:
            self.replaced.add(name)
            del self.parts["securitySchemes"][name]
        for known, scheme in (self.parts.get("securitySchemes") or {}).items():
            if known not in self.provisional and _is_same_scheme(scheme, credential.scheme):
                return str(known)
        return self.put("securitySchemes", name, dict(credential.scheme))

    def speakable(self, way: dict[str, list[str]]) -> dict[str, list[str]]:
        """Before OpenAPI 3.1, only schemes of OAuth 2.0 and OpenID Connect had scopes."""
        if not str(self.document.get("openapi")).startswith("3.0"):
            return way
        schemes = self.parts["securitySchemes"]
        return {
            name: held if schemes[name]["type"] in ("oauth2", "openIdConnect") else [] for name, held in way.items()
        }

    def tidy(self) -> None:
        """Take out what nothing refers to any more."""
        paths = json.dumps([self.document.get("paths"), self.document.get("webhooks")])
        schemas = self.parts.get("schemas") or {}
        for name in _DEFAULTS:
            others = json.dumps([part for key, part in schemas.items() if key != name])
            reference = f'"#/components/schemas/{name}"'
            if name in schemas and _is_default(name, schemas[name]) and reference not in paths + others:
                del schemas[name]
        used = {name for entry in _requirements(self.document) for name in entry}
        schemes = self.parts.get("securitySchemes") or {}
        for name in self.provisional - self.replaced - used:
            del schemes[name]
        for kind in [kind for kind, part in self.parts.items() if not part]:
            del self.parts[kind]
        if self.parts or self.had:
            self.document["components"] = self.parts


def _requirements(document: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield from document.get("security") or ()
    for item in (document.get("paths") or {}).values():
        for operation in (item or {}).values():
            if isinstance(operation, dict):
                yield from operation.get("security") or ()


def _is_same_scheme(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    def essence(scheme: Mapping[str, Any]) -> list[Any]:
        return [str(scheme.get(name, "")).lower() for name in ("type", "scheme", "in", "name", "openIdConnectUrl")]

    return essence(one) == essence(other)


def _is_default(name: str, schema: Mapping[str, Any]) -> bool:
    return schema.get("title") == name and schema.get("type") == "object"


class _Writer:
    """Writes what is known of an operation where the application has written nothing."""

    def __init__(self, written: dict[str, Any], operation: Operation, components: _Components) -> None:
        self.written = written
        self.operation = operation
        self.components = components

    def write(self) -> None:
        # A document of the application's own may have numbers for its statuses.
        responses: dict[str, Any] = {str(code): said for code, said in (self.written.get("responses") or {}).items()}
        self._promised(responses)
        asked = self._asked()
        if self.operation.validation is not None and _is_default_rejection(responses.get("422")):
            del responses["422"]
        declared = list(responses)
        for status, description in self.operation.statuses.items():
            if "200" in responses and str(status) not in responses:
                responses[str(status)] = {"description": description}
                declared.append(str(status))
        for code in declared:
            self._add_fields(code, responses[code])
        by_status: dict[int, list[Refusal]] = {}
        for refusal in self.operation.refusals:
            by_status.setdefault(refusal.kind.status, []).append(refusal)
        for status in sorted(by_status):
            if str(status) not in responses:
                content = self._response(status, by_status[status])
                codes = {refusal.kind.code for refusal in by_status[status]}
                name = codes.pop() if len(codes) == 1 else f"Problem{status}"
                responses[str(status)] = self.components.reference("responses", name, content)
        self.written["responses"] = dict(sorted(responses.items(), key=_by_code))
        if self.operation.deprecated:
            self.written["deprecated"] = True
        self._secure(asked)

    def _promised(self, responses: dict[str, Any]) -> None:
        """The problems that the endpoint says it raises."""
        kinds = {kind.code: kind for kind in registered_types()}
        for code, response in [*responses.items()]:
            if not isinstance(response, dict):
                continue
            for name in response.pop(_CODES, ()):
                if name in kinds:
                    self.operation.answers(kinds[name], inside=True)
                if not response.keys() - {"description"}:
                    responses.pop(code, None)

    def _asked(self) -> list[str] | None:
        """The scopes that the endpoint's own dependencies ask for; None where they ask for no caller."""
        said = self.written.get("security")
        if not said or not all(set(entry) <= self.components.provisional for entry in said):
            return None
        asked = [*dict.fromkeys(scope for entry in said for scopes in entry.values() for scope in scopes)]
        if self.operation.style is not DEFAULT_STYLE:
            challenge = ("WWW-Authenticate",)
            self.operation.answers(CREDENTIALS_MISSING, headers=challenge, inside=True)
            if asked:
                self.operation.answers(
                    SCOPE_INSUFFICIENT, headers=challenge, inside=True, required_scopes=["a"], missing_scopes=["a"]
                )
        return asked

    def _fields(self, status: int, place: int) -> dict[str, Field]:
        """What a response has that comes from `place`: the fields of the policies outside of it."""
        return {one.name: one for one in self.operation.fields if one.place < place and one.when(status)}

    def _add_fields(self, code: str, response: dict[str, Any]) -> None:
        status = int(code[0]) * 100 if code[1:].upper() == "XX" else int(code) if code.isdigit() else None
        if status is None or not isinstance(response, dict) or "$ref" in response:
            return
        fields = self._fields(status, INSIDE)
        taken = {name.lower() for name in response.get("headers") or ()}
        for name, one in fields.items():
            if name.lower() not in taken:
                # A range of statuses may have answers that are not the application's.
                required = one.required and code.isdigit()
                header = _header(one.description, one.schema, required=required)
                response.setdefault("headers", {})[name] = self.components.reference("headers", name, header)

    def _response(self, status: int, refusals: Sequence[Refusal]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        headers: dict[str, dict[str, Any]] = {}
        everywhere: set[str] | None = None
        for one in refusals:
            problem = self.components.reference("schemas", "Problem", _PROBLEM)
            media = content.setdefault(one.style.media_type, {"schema": problem, "examples": {}})
            value = _example(one.kind, one.style, one.members)
            media["examples"].setdefault(one.kind.code, {"summary": one.kind.title, "value": value})
            fields = self._fields(status, one.place)
            for name, field in fields.items():
                headers.setdefault(name, _header(field.description, field.schema))
            for name, (description, schema) in one.headers.items():
                headers.setdefault(name, _header(description, schema))
            sure = {name for name, field in fields.items() if field.required}
            everywhere = sure if everywhere is None else everywhere & sure
        for name in everywhere or ():
            headers[name]["required"] = True
        titles = dict.fromkeys(one.kind.title for one in refusals)
        response: dict[str, Any] = {"description": ", ".join(titles), "content": content}
        if headers:
            response["headers"] = {
                name: self.components.reference("headers", name, header) for name, header in sorted(headers.items())
            }
        return response

    def _secure(self, asked: Sequence[str] | None) -> None:
        operation = self.operation
        if not operation.credentials or (asked is None and self.written.get("security") is not None):
            return
        names = {id(one): self.components.scheme(one) for one in operation.credentials}
        named = [(one, names[id(one)]) for one in operation.credentials]
        anyone: Alternatives = [{name: []} for _, name in named]
        if operation.requires is not None or asked is not None:
            security = alternatives(AllOf() if operation.requires is None else operation.requires, named) or anyone
            security = [
                {name: [*dict.fromkeys((*held, *(asked or ())))] for name, held in way.items()} for way in security
            ]
        elif operation.required:
            security = anyone
        elif operation.public:
            security = []
        else:
            security = [*anyone, {}]
        self.written["security"] = _distinct(self.components.speakable(way) for way in security)


def alternatives(requirement: Requirement, credentials: Sequence[tuple[Credential, str]]) -> Alternatives:
    """`requirement` as OpenAPI says it: one of these, each with all of its schemes."""
    if isinstance(requirement, Either):
        return _distinct(one for side in requirement.sides for one in alternatives(side, credentials))
    if isinstance(requirement, Both):
        ways: Alternatives = [{}]
        for side in requirement.sides:
            pairs = product(ways, alternatives(side, credentials))
            ways = _distinct(_together(one, other) for one, other in pairs)
        return ways
    scopes: AllOf | AnyOf = AllOf()
    fitting = [name for _, name in credentials]
    if isinstance(requirement, AllOf | AnyOf):
        scopes = requirement
    elif isinstance(requirement, FromIssuer):
        scopes = requirement.scopes
        fitting = [name for one, name in credentials if one.issuers is not None and requirement.issuer in one.issuers]
    elif isinstance(requirement, FromApiKey):
        scopes = requirement.scopes
        fitting = [name for one, name in credentials if one.kind == "api_key"]
    named = [[scope] for scope in scopes.scopes] if isinstance(scopes, AnyOf) else [list(scopes.scopes)]
    return _distinct({name: held} for held in named for name in fitting)


def _together(one: Mapping[str, list[str]], other: Mapping[str, list[str]]) -> dict[str, list[str]]:
    return {name: [*dict.fromkeys((*one.get(name, ()), *other.get(name, ())))] for name in {**one, **other}}


def _distinct(ways: Iterable[dict[str, list[str]]]) -> Alternatives:
    found: Alternatives = []
    for way in ways:
        if way not in found:
            found.append(way)
        if len(found) == _MOST_ALTERNATIVES:
            break
    return found


def _is_default_rejection(response: Any) -> bool:
    """Whether FastAPI has written this 422, and nobody else."""
    content = response.get("content") if isinstance(response, dict) else None
    schema = content.get("application/json", {}).get("schema") if isinstance(content, dict) else None
    return schema == {"$ref": "#/components/schemas/HTTPValidationError"}


def _header(description: str, schema: Mapping[str, Any], *, required: bool = False) -> dict[str, Any]:
    header: dict[str, Any] = {"description": description, "schema": dict(schema)}
    return {**header, "required": True} if required else header


def _example(kind: ProblemType, style: ProblemStyle, members: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": style.type_uri(kind),
        "title": kind.title,
        "status": kind.status,
        "instance": "/the/path",
        "error_code": kind.code,
        "timestamp": "2026-01-11T12:00:00Z",
        "request_id": "550e8400-e29b-41d4-a716-446655440000",
        "recovery_hints": list(kind.hints),
        **members,
    }


def _by_code(item: tuple[str, Any]) -> tuple[bool, str]:
    return not item[0].isdigit(), item[0]


# --- the command -----------------------------------------------------------------------------------------------------


class _TargetError(Exception):
    """What was named is no application; the text says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the enriched document of an application as JSON; the number is the exit status."""
    parser = ArgumentParser(prog="python -m sigil_policy.frameworks.openapi", description=main.__doc__)
    parser.add_argument("app", metavar="MODULE:APP", help="a FastAPI application, for example package.module:app")
    parser.add_argument("--factory", action="store_true", help="APP is a function that makes the application")
    options = parser.parse_args(arguments)
    try:
        api = find_api(enrich_openapi(_load(options.app, factory=options.factory)))
    except (_TargetError, TypeError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)  # noqa: T201  a command
        return 2
    print(json.dumps(api.openapi(), indent=2, ensure_ascii=False))  # noqa: T201
    return 0


def _load(target: str, *, factory: bool) -> Any:
    module, colon, names = target.partition(":")
    if not colon or not module or not names:
        raise _TargetError(f"{target!r} names no application; write MODULE:APP, for example package.module:app")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise _TargetError(f"there is no module {error.name!r}; start the command where it can be imported") from None
    for name in names.split("."):
        with suppress(AttributeError):
            found = getattr(found, name)
            continue
        raise _TargetError(f"module {module!r} has no {names!r}")
    if not factory:
        if isinstance(found, type) or not (isinstance(found, FastAPI) or hasattr(found, "app")):
            raise _TargetError(
                f"{target!r} is no FastAPI application, but {type(found).__name__}; a function that makes one takes "
                "--factory"
            )
        return found
    make: Callable[[], Any] = found
    if not callable(make):
        raise _TargetError(f"{target!r} is no function that makes an application, but {type(found).__name__}")
    return make()


if __name__ == "__main__":
    sys.exit(main())
