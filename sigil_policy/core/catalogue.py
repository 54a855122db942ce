"""The problem types that the library itself answers with: one code for each cause."""

from functools import cache
from http import HTTPStatus

from sigil_policy.core.problems import ProblemType, library_type

CREDENTIALS_MISSING = library_type(
    "AUTH_001", "AuthenticationRequiredError", 401,
    "Send a valid credential with the request",
    description="This route takes an authenticated caller, and the request said of nobody who calls.",
)  # fmt: skip
TOKEN_INVALID = library_type(
    "AUTH_002", "InvalidTokenError", 401,
    "Obtain a new access token", "Check that the token was issued for this API",
    description="The access token is not valid here: expired, revoked, altered, or issued for somebody else.",
)  # fmt: skip
CREDENTIALS_MALFORMED = library_type(
    "AUTH_003", "MalformedCredentialsError", 400,
    "Send one Authorization header of the form 'Bearer <token>'",
    description="The header that carries the credential is not of the form that its scheme has.",
)  # fmt: skip
SCOPE_INSUFFICIENT = library_type(
    "AUTH_004", "InsufficientScopeError", 403,
    "Request a credential with the scopes named in required_scopes",
    description="The credential is valid, but does not have the scopes that this route takes.",
)  # fmt: skip
KEY_INVALID = library_type(
    "AUTH_005", "InvalidApiKeyError", 401,
    "Check the API key, or have a new one issued",
    description="The API key is not valid here: mistyped, unknown, expired or revoked.",
)  # fmt: skip
CREDENTIALS_CONFLICTING = library_type(
    "AUTH_006", "ConflictingCredentialsError", 400,
    "Send either a bearer token or an API key, not both",
    description="The request carries two credentials, and nothing says which of them acts.",
)  # fmt: skip
CREDENTIALS_IN_QUERY = library_type(
    "AUTH_007", "CredentialsInQueryError", 400,
    "Send the credential in a header; query strings end up in logs", "Treat the exposed credential as leaked",
    description="The request carries a credential in its query string, where logs and histories keep it.",
)  # fmt: skip
KEYS_UNAVAILABLE = library_type(
    "AUTH_008", "KeysUnavailableError", 503,
    "Wait for the number of seconds in Retry-After, then try again with the same token",
    description="The keys that verify tokens cannot be had at the moment; the token itself may be right.",
)  # fmt: skip
TICKET_INVALID = library_type(
    "AUTH_009", "InvalidTicketError", 401,
    "Obtain a new ticket and use it at once; each holds for one connection",
    description="The ticket that opens a connection is unknown, expired or was used before.",
)  # fmt: skip
PROOF_INVALID = library_type(
    "AUTH_010", "InvalidProofError", 401,
    "Send one DPoP header with a new proof, made for this method, this URL and this token",
    "Check the clock of the client",
    description="The token is bound to a key, and no valid proof shows that the caller holds it (RFC 9449).",
)  # fmt: skip
PROOF_NONCE_REQUIRED = library_type(
    "AUTH_011", "ProofNonceRequiredError", 401,
    "Make a new proof with the nonce of the DPoP-Nonce header, then try again",
    description="The proof that the caller holds its key needs a nonce that the server gives (RFC 9449 section 9).",
)  # fmt: skip
RATE_EXCEEDED = library_type(
    "RATE_001", "RateLimitExceededError", 429,
    "Wait for the number of seconds in Retry-After", "Spread requests evenly, or ask for a higher tier",
    description="The caller has made as many requests as its tier allows in a window of time.",
)  # fmt: skip
CONCURRENCY_EXCEEDED = library_type(
    "RATE_002", "ConcurrencyLimitExceededError", 429,
    "Wait until a request that is in flight has ended", "Send fewer requests at the same time",
    description="The caller has as many requests in flight as its tier allows at the same time.",
)  # fmt: skip
LIMITS_UNAVAILABLE = library_type(
    "RATE_003", "LimitsUnavailableError", 503,
    "Wait for the number of seconds in Retry-After, then try again",
    description="The counters of the limits cannot be reached, and nobody is admitted uncounted.",
)  # fmt: skip
AUTH_FAILURES_EXCEEDED = library_type(
    "RATE_004", "AuthenticationFailuresExceededError", 429,
    "Wait for the number of seconds in Retry-After", "Check the credential before you send it again",
    description="Too many credentials from this caller were refused in a short time.",
)  # fmt: skip
TICKETS_EXCEEDED = library_type(
    "RATE_005", "TooManyTicketsError", 429,
    "Use the tickets that were issued, or wait for the number of seconds in Retry-After",
    description="The caller holds as many unused tickets as it may.",
)  # fmt: skip
BUDGET_EXCEEDED = library_type(
    "CTX_003", "TokenBudgetExceededError", 429,
    "Wait for the number of seconds in Retry-After", "Ask for fewer tokens, or for a higher tier",
    description="The caller has used the language-model tokens that its tier has in a window of time.",
)  # fmt: skip
BUDGET_TOO_SMALL = library_type(
    "CTX_004", "TokenEstimateTooLargeError", 422,
    "Ask for fewer tokens: this request can never fit into the budget of its tier", "Ask for a higher tier",
    description="The request asks for more language-model tokens than its tier has in a whole window.",
)  # fmt: skip
VALIDATION_FAILED = library_type(
    "REQ_001", "RequestValidationError", 400,
    "Check field validation requirements", "Refer to API documentation for valid values",
    description="The request is not of the form that this route takes; the member errors says where.",
)  # fmt: skip
SEMANTICS_FAILED = library_type(
    "REQ_002", "RequestSemanticsError", 422,
    "Check field validation requirements", "Refer to API documentation for valid values",
    description="The request has the right form, but what it says cannot be; the member errors says where.",
)  # fmt: skip
BODY_TOO_LARGE = library_type(
    "REQ_003", "RequestTooLargeError", 413,
    "Send a smaller request body", "Announce its length in Content-Length",
    description="The body of the request is larger than this route takes; the member max_bytes says what it takes.",
)  # fmt: skip
VERSION_RETIRED = library_type(
    "API_001", "VersionRetiredError", 410,
    "Use the successor version named in the Link header",
    description="This version of the API has been retired.",
)  # fmt: skip

_HTTP_HINTS = {
    400: ("Check the syntax of the request",),
    401: ("Send a valid credential with the request",),
    403: ("Ask the owner of the resource for access",),
    404: ("Check the path and the identifier",),
    405: ("Use one of the methods in the Allow header",),
    409: ("Read the current state of the resource, then try again",),
    413: ("Send a smaller request body",),
    415: ("Send the body in a media type that this resource accepts",),
    429: ("Wait before you try again",),
    500: ("Try again later", "Give the request_id when you report this error"),
    503: ("Try again later",),
}

# The registered phrases changed in RFC 7231 and RFC 9110; Python 3.11 still has the older ones.
_NEWEST_PHRASES = {
    413: "Content Too Large",
    414: "URI Too Long",
    416: "Range Not Satisfiable",
    422: "Unprocessable Content",
}


# Statuses are at most 200, and the application chooses them: the cache is bounded by its nature.
@cache
def http_problem(status: int) -> ProblemType:
    """The type for a plain HTTP error of the application: `REQ_404`, `SRV_500`; the title is the status phrase."""
    try:
        title = HTTPStatus(status).phrase
    except ValueError:
        title = "Client Error" if status < 500 else "Server Error"
    title = _NEWEST_PHRASES.get(status, title)
    return library_type(
        f"{'REQ' if status < 500 else 'SRV'}_{status}", title, status, *_HTTP_HINTS.get(status, ()),
        description=f"A plain HTTP error: the application said {status} and no more (RFC 9110 section 15).",
    )  # fmt: skip
