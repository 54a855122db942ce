"""Every error of the application as an RFC 9457 problem: what is raised, what is rejected, what a framework sends."""

from sigil_policy.policies.problems.http_errors import from_http_error as from_http_error
from sigil_policy.policies.problems.http_errors import unhandled as unhandled
from sigil_policy.policies.problems.policy import Problems as Problems
from sigil_policy.policies.problems.validation import from_validation_errors as from_validation_errors
from sigil_policy.policies.problems.validation import json_pointer as json_pointer
