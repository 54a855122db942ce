"""Whose token it is: a token that is bound to a key or a certificate is good only from who holds that.

    senders = Senders((DPoP(origin="https://api.example.com"), ClientCertificate(trusted_proxies=["10.0.0.0/8"])))
    token = senders.token(authorization)                 # of `Bearer ...`, and of `DPoP ...` where that is taken
    answer = senders.confirm(ex, principal)              # None: this exchange is by the one it is bound to

Guarantees:

* **Each binding that a token names is confirmed for this exchange**, also where the token is remembered: `cnf.jkt` by a
  proof (RFC 9449), `cnf.x5t#S256` by the certificate (RFC 8705). One that no sender here can confirm is refused, unless
  `accept_bound_tokens_without_proof`.
* **No downgrade**: a token with `cnf.jkt` is refused as `Bearer`, and one without is refused as `DPoP` (RFC 9449
  section 7.2).
* Other members of `cnf` are ignored beside one that was confirmed (RFC 7800 section 3.1); alone, the token is refused.
"""

from collections.abc import Awaitable, Iterable, Mapping, Sequence
from typing import Any, cast

from sigil_policy.core.catalogue import PROOF_INVALID, PROOF_NONCE_REQUIRED, TOKEN_INVALID, http_problem
from sigil_policy.core.exchange import Exchange, Head
from sigil_policy.core.facts import Principal
from sigil_policy.core.policy import Closable
from sigil_policy.core.problems import Problem
from sigil_policy.identity.challenges import HeaderLines, challenge_line
from sigil_policy.identity.client_certificates import ClientCertificate
from sigil_policy.identity.dpop import DPoP, NonceRequired, ProofError
from sigil_policy.stores.limits import StoreUnavailableError
from sigil_policy.wire.authorization import bearer_token
from sigil_policy.wire.challenges import with_parameter

Sender = DPoP | ClientCertificate

_DPOP = b"dpop"
_KEY, _CERTIFICATE = "jkt", "x5t#S256"


class Senders:
    """The ways in which the sender of a token is confirmed.

    Options:
        senders: at most one of each kind; without any, bound tokens are refused.
        realm: the protection space that challenges name.
        required: refuse tokens that are bound to nobody.
        accept_bound_tokens_without_proof: let tokens pass that are bound in a way for which there is no sender here.

    Raises `ValueError` for two senders of a kind, and for options that contradict each other.
    """

    __slots__ = (
        "_certificate", "_dpop", "_required", "_unproven", "active", "challenge", "invalid_proof", "invalid_request",
        "invalid_token", "invalid_token_as_dpop", "nonce_required",
    )  # fmt: skip

    def __init__(
        self,
        senders: Sequence[Sender] = (),
        *,
        realm: str = "api",
        required: bool = False,
        accept_bound_tokens_without_proof: bool = False,
    ) -> None:
        proofs = [sender for sender in senders if isinstance(sender, DPoP)]
        certificates = [sender for sender in senders if isinstance(sender, ClientCertificate)]
        if len(proofs) > 1 or len(certificates) > 1:
            raise ValueError("sender has two of one kind; give DPoP several origins, or ClientCertificate all proxies")
        if required and not senders:
            raise ValueError(
                "sender_required takes a sender, for example sender=DPoP(origin='https://api.example.com')"
            )
        if required and accept_bound_tokens_without_proof:
            raise ValueError("sender_required and accept_bound_tokens_without_proof contradict each other")
        self._dpop = proofs[0] if proofs else None
        self._certificate = certificates[0] if certificates else None
        self._required = required
        self._unproven = accept_bound_tokens_without_proof
        self.active = bool(senders)
        """Whether anything of an exchange has to be looked at. Without, `refuses` says all."""
        self.challenge = self._lines(realm)
        """The lines for who has presented no token: each scheme that is taken, `Bearer` first."""
        self.invalid_request = self._lines(realm, "invalid_request", "Bearer")
        self.invalid_token = self._lines(realm, "invalid_token", "Bearer")
        self.invalid_token_as_dpop = self._lines(realm, "invalid_token", "DPoP")
        self.invalid_proof = self._lines(realm, "invalid_dpop_proof", "DPoP")
        self.nonce_required = self._lines(realm, "use_dpop_nonce", "DPoP")

    def _lines(self, realm: str, error: str | None = None, scheme: str | None = None) -> HeaderLines:
        """A challenge of each scheme that is taken; the error stands in that of the scheme that was used."""
        schemes = []
        if self._dpop is None or self._certificate is not None or not self._required:
            schemes.append("Bearer")
        if self._dpop is not None:
            schemes.append("DPoP")
        if scheme not in schemes:
            scheme = schemes[0]
        lines = []
        for own in schemes:
            name, line = challenge_line(own, realm, error if own == scheme else None)
            if own == "DPoP" and self._dpop is not None:
                line = with_parameter(line, "algs", " ".join(self._dpop.algorithms))
            lines.append((name, line))
        return tuple(lines)

    def token(self, value: bytes) -> bytes | None:
        """The token in an `Authorization` field line; None for a scheme that is not taken.

        The token is not checked. `ValueError` where none follows the scheme.
        """
        if self._dpop is None or value[:4].lower() != _DPOP or value[4:5] not in (b" ", b""):
            return bearer_token(value)
        token = value[5:].lstrip(b" ")
        if not token:
            raise ValueError("no token follows the scheme DPoP")
        return token

    def refused(self, ex: Exchange) -> Problem:
        """The answer to a token that is not valid, in the scheme in which it was presented."""
        return _refused(self.invalid_token_as_dpop if self._is_dpop(ex) else self.invalid_token)

    def refuses(self, principal: Principal) -> bool:
        """Whether nobody who presents this token can be let in."""
        return not self.active and not self._unproven and "cnf" in principal.claims

    def confirm(self, ex: Exchange, principal: Principal) -> Problem | Awaitable[Problem | None] | None:
        """None where `ex` is by the one whom the token of `principal` is bound to; else the answer."""
        as_dpop = self._is_dpop(ex)
        claims = principal.claims
        if "cnf" not in claims:
            return self.refused(ex) if as_dpop or self._required else None
        bound = claims["cnf"]
        if not isinstance(bound, Mapping) or (_KEY not in bound and _CERTIFICATE not in bound):
            return None if self._unproven and not as_dpop else self.refused(ex)
        if _CERTIFICATE in bound and not self._has_certificate(ex, bound[_CERTIFICATE]):
            return self.refused(ex)
        if as_dpop:
            # Every DPoP token is bound to a key, and a key is confirmed by nothing else.
            thumbprint = bound.get(_KEY)
            return self._confirm_key(ex, thumbprint) if isinstance(thumbprint, str) else self.refused(ex)
        if _KEY in bound and not (self._dpop is None and self._unproven):
            return self.refused(ex)
        return None

    def supply_nonce(self, ex: Exchange, head: Head) -> None:
        """Give a client the nonce for its next requests, where that is due."""
        if self._dpop is not None:
            self._dpop.supply_nonce(ex, head)

    @property
    def has_nonces(self) -> bool:
        return self._dpop is not None and self._dpop.has_nonces

    def resources(self) -> Iterable[Closable]:
        store = None if self._dpop is None else self._dpop.store
        return (cast("Closable", store),) if hasattr(store, "aclose") else ()

    def _is_dpop(self, ex: Exchange) -> bool:
        return self._dpop is not None and ex.headers.get(b"authorization", b"")[:5].lower() == b"dpop "

    def _has_certificate(self, ex: Exchange, thumbprint: Any) -> bool:
        if self._certificate is None:
            return self._unproven
        # Both are public; and None, for no certificate, is no text.
        return isinstance(thumbprint, str) and self._certificate.thumbprint(ex) == thumbprint

    def _confirm_key(self, ex: Exchange, thumbprint: str) -> Problem | Awaitable[Problem | None] | None:
        dpop = cast("DPoP", self._dpop)
        token = ex.headers[b"authorization"][5:].lstrip(b" ")
        try:
            name = dpop.verify(ex, token, thumbprint)
            first = dpop.claim(ex, name)
        except ProofError as error:
            return self._unproved(ex, error.reason)
        except StoreUnavailableError as lost:
            return _unavailable(lost.retry_after)
        if isinstance(first, Awaitable):
            return self._confirm_later(ex, first)
        return None if first else self._unproved(ex, "used")

    async def _confirm_later(self, ex: Exchange, claiming: Awaitable[bool]) -> Problem | None:
        try:
            first = await claiming
        except StoreUnavailableError as lost:
            return _unavailable(lost.retry_after)
        return None if first else self._unproved(ex, "used")

    def _unproved(self, ex: Exchange, reason: str) -> Problem:
        if reason == "key":
            return _refused(self.invalid_token_as_dpop)
        if reason == "nonce":
            nonce = (b"dpop-nonce", ex[NonceRequired].nonce)
            return PROOF_NONCE_REQUIRED(
                "The proof has to carry a nonce of this service", headers=(*self.nonce_required, nonce)
            )
        # One answer for every other cause: which it was would help only whoever forges proofs.
        return PROOF_INVALID("The proof of possession is not valid for this request", headers=self.invalid_proof)


def _refused(lines: HeaderLines) -> Problem:
    return TOKEN_INVALID("The access token is not valid", headers=lines)


def _unavailable(wait: float) -> Problem:
    return http_problem(503)("Proofs of possession cannot be checked at the moment.", retry_after=wait)
