"""Problems that are raised inside of a framework which lets no exception out.

Litestar, Quart, Django, Falcon and BlackSheep answer every exception themselves, so no stack around them sees one. Each
has a place for the application's own handlers; there, two lines make the answer:

    @app.errorhandler(Problem)                                      # Quart
    async def problem(error: Problem) -> quart.Response:
        reply = reply_to(error)
        return quart.Response(reply.body, reply.status, text_headers(reply))

What these frameworks answer without being told how is rewritten by `Problems`; this is for what the application raises.
"""

from sigil_policy.core.exchange import current_exchange
from sigil_policy.core.problems import Problem, Reply


def reply_to(error: Problem) -> Reply:
    """The reply for a problem that was raised, as the mounted `Problems` policy has it look.

    Raises `LookupError` when no `PolicyStack` is around the application.
    """
    ex = current_exchange()
    if ex is None:
        raise LookupError("no PolicyStack is around this application; write app = PolicyStack(app, policies=[...])")
    return ex.style.render(error, ex)


def text_headers(reply: Reply) -> list[tuple[str, str]]:
    """The headers of a reply as text, in their order, for frameworks that take them so."""
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in reply.headers]
