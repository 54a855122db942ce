"""When a credential ends in the middle of a WebSocket.

    def on_check(self, ex: Exchange) -> Close | float | None:
        return until_credentials_end(ex)

A handshake is judged once, and a connection may last for days: what was good then is asked for again while it lasts.
Clients see close code 4401, as 401 would have been the answer to a request.
"""

from sigil_policy.core.exchange import Exchange
from sigil_policy.core.policy import CREDENTIAL_ENDED, Answer, Close
from sigil_policy.core.problems import close_code

_LONGEST = 60.0  # seconds: a clock that was set is noticed within them

ENDED = Close(CREDENTIAL_ENDED, "the credential has ended")


def until_credentials_end(ex: Exchange, longest: float | None = None) -> Close | float | None:
    """How many seconds the first of the credentials of `ex` still holds, `longest` or 60 at most.

    Where none of them ends, that is `longest`, which may be None.
    """
    ends = min((principal.expires for principal in ex.principals if principal.expires is not None), default=None)
    if ends is None:
        return longest
    left = ends - ex.clock.time()
    return min(left, longest or _LONGEST) if left > 0 else ENDED


def close_for(answer: Answer) -> Close | None:
    """The close that says what `answer` would say to a request: 4401 for 401, else as for a refused handshake."""
    if answer is None:
        return None
    return ENDED if answer.status == 401 else Close(close_code(answer.status))
