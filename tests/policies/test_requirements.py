"""Who has to vouch for a caller: the algebra of requirements, and what a route with one answers."""

import copy
import itertools
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from sigil_policy.core.exchange import get_exchange
from sigil_policy.core.facts import Principal
from sigil_policy.core.policy import Policy
from sigil_policy.core.stack import PolicyStack
from sigil_policy.identity.api_keys import MemoryApiKeyStore, new_key
from sigil_policy.identity.requirements import (
    AllOf,
    AnyOf,
    Both,
    Case,
    Either,
    FromApiKey,
    FromIssuer,
    Standing,
)
from sigil_policy.policies.api_key import ApiKeyAuth
from sigil_policy.policies.auth_failures import AuthFailureLimit
from sigil_policy.policies.bearer import BearerAuth
from sigil_policy.policies.revocation import Revocation
from sigil_policy.policies.scopes import Scopes
from sigil_policy.stores.revocations import MemoryRevocations
from sigil_policy.testing import FrozenClock, drive
from tests.identity.material import NOW, URL, good_claims, make_issuer, token

pytestmark = pytest.mark.anyio

OTHER = "https://other.example"
PEPPER = SecretStr("p" * 32)
KEY, RECORD = new_key(pepper=PEPPER, subject="till", scopes=["y"])
ADMIN_KEY, ADMIN_RECORD = new_key(pepper=PEPPER, subject="till", scopes=["admin"])
ANNS_KEY, ANNS_RECORD = new_key(pepper=PEPPER, subject="ann", scopes=["y"])
STORE = MemoryApiKeyStore([RECORD, ADMIN_RECORD, ANNS_RECORD])


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "FromIssuer('https://a')",
        "FromIssuer('https://a', scopes='x')",
        "FromIssuer('https://a', scopes=['x', 'y'])",
        "FromApiKey()",
        "FromApiKey('x')",
        "FromApiKey(AnyOf('x', 'y'))",
        "FromIssuer('https://a', scopes='x') | FromApiKey('x')",
        "AllOf('x') & FromApiKey()",
        "FromIssuer('https://a') & FromApiKey() | FromIssuer('https://b')",
        "(FromIssuer('https://a') | FromIssuer('https://b')) & FromApiKey() & AnyOf('x', 'y')",
        "Both(FromIssuer('https://a') | AllOf('x'), FromApiKey(), same_subject=True) | FromIssuer('https://b')",
    ],
)
def test_a_requirement_reads_as_it_is_written(text):
    value = eval(text)
    assert repr(value) == text
    for same in (copy.copy(value), copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
        assert same == value and hash(same) == hash(value) and repr(same) == text


def test_equal_requirements_are_equal_in_any_order():
    a, b, c = FromIssuer("https://a"), FromApiKey("x y"), AllOf("x")
    assert a & b == b & a != a | b
    assert (a & b) & c == a & (b & c) == Both(a, b, c)
    assert a | (b | c) == Either(c, b, a)
    assert Both(a, b, same_subject=True) != Both(a, b)
    assert Both(Both(a, b, same_subject=True), c) != Both(a, b, c, same_subject=True)
    assert Both(Both(a, b), c, same_subject=True) == Both(a, b, c, same_subject=True)
    assert FromApiKey("x y") == FromApiKey(["y", "x"]) != FromApiKey(AnyOf("x", "y"))
    assert FromIssuer(make_issuer()) == FromIssuer(URL) != FromIssuer(URL + "/")
    assert len({a & b, b & a, a | b, a, b}) == 4
    assert Scopes(routes={"/a": a & b}) == Scopes(routes={"/a": b & a}) != Scopes(routes={"/a": a | b})


def test_scopes_as_text_can_be_a_side():
    assert "x y" & FromApiKey() == FromApiKey() & "x y" == AllOf("x", "y") & FromApiKey()
    assert "x" | FromApiKey() == FromApiKey() | "x" == Either(AllOf("x"), FromApiKey())


@pytest.mark.parametrize("value", [AllOf("x"), FromApiKey("x"), FromIssuer("https://a"), AllOf("x") | FromApiKey()])
def test_a_requirement_never_changes(value):
    with pytest.raises(AttributeError, match="value"):
        value.scopes = AllOf()
    with pytest.raises(AttributeError, match="value"):
        del value.scopes


def test_and_or_and_not_drop_no_side_without_a_word():
    with pytest.raises(TypeError, match=r"& and \|"):
        FromIssuer("https://a") and FromApiKey()
    with pytest.raises(TypeError, match=r"& and \|"):
        FromIssuer("https://a") or FromApiKey()
    with pytest.raises(TypeError, match=r"& and \|"):
        not AllOf("x")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FromIssuer(""), "https://auth.example.com"),
        (lambda: FromIssuer("https://a b"), "Issuer or its url"),
        (lambda: FromIssuer("https://a\n"), "Issuer or its url"),
        (lambda: FromIssuer("a" * 2_049), "Issuer or its url"),
        (lambda: FromIssuer(["https://a", "https://b"]), r"FromIssuer\(a\) \| FromIssuer\(b\)"),
        (lambda: FromIssuer(None), "Issuer or its url"),
        (lambda: FromIssuer("https://a", scopes='x"'), "6749"),
        (lambda: FromIssuer("https://a", scopes=" "), "any caller"),
        (lambda: FromApiKey(""), "any caller"),
        (lambda: FromApiKey(["x y"]), "6749"),
        (lambda: FromApiKey(FromApiKey()), "any caller"),
        (lambda: FromApiKey() & "", "any caller"),
        (lambda: Both(FromApiKey()), "two requirements"),
        (lambda: Either(), "two requirements"),
        (lambda: Both(FromApiKey(), 5), "any caller"),
        (lambda: Both("x", "y", same_subject=1), "True or False"),
        (lambda: Both(*["x"] * 65), "65 terms"),
    ],
)  # fmt: skip
def test_what_is_no_requirement_is_refused_when_it_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_other_things_are_no_sides():
    for wrong in (5, ["x"], None):
        with pytest.raises(TypeError, match="unsupported operand"):
            FromApiKey() & wrong
        with pytest.raises(TypeError, match="unsupported operand"):
            wrong | FromApiKey()


def test_depth_is_bounded():
    value = AllOf("x")
    for _ in range(8):
        value = value & "x" | "x"
    with pytest.raises(ValueError, match="17 deep"):
        value & "x"


@pytest.mark.parametrize("value", [FromApiKey, [FromApiKey()], {"issuer": "https://a"}])
def test_a_route_takes_requirements_only(value):
    with pytest.raises(ValidationError, match="route 'GET /a'"):
        Scopes(routes={"GET /a": value})


# --- the verdict, against an interpreter that knows nothing but the words ---------------------------------------------

SCOPES = ["x", "y", "admin"]
ISSUERS = ["https://a", "https://b"]

scope_sets = st.one_of(
    st.lists(st.sampled_from(SCOPES[:2]), max_size=2).map(lambda scopes: AllOf(*scopes)),
    st.lists(st.sampled_from(SCOPES[:2]), min_size=1, max_size=2).map(lambda scopes: AnyOf(*scopes)),
)
atoms = st.one_of(
    scope_sets,
    st.builds(FromIssuer, st.sampled_from(ISSUERS), scope_sets),
    st.builds(FromApiKey, scope_sets),
)
requirements = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map(lambda sides: Either(*sides)),
        st.tuples(st.lists(inner, min_size=2, max_size=3), st.booleans()).map(
            lambda given: Both(*given[0], same_subject=given[1])
        ),
    ),
    max_leaves=6,
)
principals = st.builds(
    lambda subject, scopes, issuer: Principal(
        subject=subject, scopes=frozenset(scopes), kind="bearer" if issuer else "api_key", issuer=issuer
    ),
    st.sampled_from(["ann", "bob"]),
    st.sets(st.sampled_from(SCOPES)),
    st.sampled_from([None, *ISSUERS]),
)
callers = st.lists(principals, min_size=1, max_size=3).map(tuple)
superscopes = st.sampled_from(["admin", None])


def ways(value, groups=()):
    """Every set of terms that would do, each term with the groups whose terms one subject has to fulfil."""
    if isinstance(value, Either):
        return [way for side in value.sides for way in ways(side, groups)]
    if isinstance(value, Both):
        inside = (*groups, object()) if value.same_subject else groups
        return [
            [*itertools.chain(*chosen)] for chosen in itertools.product(*(ways(side, inside) for side in value.sides))
        ]
    return [[(value, groups)]]


def fit(term, principal, everybody, superscope):
    """How one credential fits one term; `None` is the one that was not presented."""
    if isinstance(term, FromIssuer):
        slot, right = [p for p in everybody if p.kind == "bearer"], lambda p: p.issuer == term.issuer
    elif isinstance(term, FromApiKey):
        slot = [p for p in everybody if p.kind == "api_key"]
        right = slot.__contains__
    else:
        slot, right = everybody, lambda p: p is everybody[0]
    if principal is None:
        return Standing.FOREIGN if slot else Standing.ABSENT
    if not right(principal):
        return Standing.FOREIGN
    scopes = term if isinstance(term, AllOf | AnyOf) else term.scopes
    wanted = [scope in principal.scopes for scope in scopes.scopes]
    enough = all(wanted) if isinstance(scopes, AllOf) else any(wanted)
    return Standing.HELD if enough or (superscope and superscope in principal.scopes) else Standing.LACKING


def interpreted(value, everybody, superscope):
    best = Standing.FOREIGN
    for way in ways(value):
        for chosen in itertools.product((None, *everybody), repeat=len(way)):
            subjects = {}
            for (_, groups), principal in zip(way, chosen, strict=True):
                for group in groups if principal is not None else ():
                    subjects.setdefault(group, set()).add(principal.subject)
            if all(len(named) == 1 for named in subjects.values()):
                fits = [fit(term, who, everybody, superscope) for (term, _), who in zip(way, chosen, strict=True)]
                best = max(best, min(fits))
    return best


@settings(max_examples=200)
@given(requirements, callers, superscopes)
def test_the_verdict_is_that_of_the_words(value, everybody, superscope):
    assert value.standing(Case(everybody, superscope)) is interpreted(value, everybody, superscope)


@settings(max_examples=80)
@given(requirements, requirements, requirements, callers, superscopes)
def test_the_laws_of_the_verdict(a, b, c, everybody, superscope):
    def verdict(value):
        return value.standing(Case(everybody, superscope))

    assert verdict(a & b) is verdict(b & a) and verdict(a | b) is verdict(b | a)
    assert verdict(Both(a & b, c)) is verdict(Both(a, b & c)) is verdict(a & b & c)
    assert verdict(Either(a | b, c)) is verdict(Either(a, b | c)) is verdict(a | b | c)
    assert verdict(a & (a | b)) is verdict(a) is verdict(a | (a & b))
    assert verdict(a & (b | c)) is verdict((a & b) | (a & c))
    assert verdict(a & a) is verdict(a) is verdict(a | a)
    assert verdict(Both(a, b, same_subject=True)) <= verdict(a & b)


@settings(max_examples=80)
@given(requirements, callers, superscopes)
def test_what_is_lacking_is_said_and_would_open(value, everybody, superscope):
    if value.standing(Case(everybody, superscope)) is not Standing.LACKING:
        return
    lacks = value.lacks(Case(everybody, superscope))
    assert lacks and all(lack.scopes.missing(lack.principal.scopes) for lack in lacks)
    given_them = tuple(
        Principal(
            subject=p.subject, kind=p.kind, issuer=p.issuer,
            scopes=p.scopes.union(*(lack.scopes.scopes for lack in lacks if lack.principal is p)),
        )
        for p in everybody
    )  # fmt: skip
    assert value.standing(Case(given_them, superscope)) is Standing.HELD


@settings(max_examples=80)
@given(requirements)
def test_any_requirement_is_read_back_from_how_it_is_written(value):
    assert eval(repr(value)) == value


class Known(Policy):
    """The exchange's credentials, as a test has made them up."""

    gives = (Principal,)
    everybody: tuple

    def on_request(self, ex):
        ex.authenticate(self.everybody[0])
        for principal in self.everybody[1:]:
            ex.cosign(principal)


ANSWERS = {
    Standing.HELD: (200, None),
    Standing.LACKING: (403, "AUTH_004"),
    Standing.ABSENT: (401, "AUTH_001"),
    Standing.FOREIGN: (403, "REQ_403"),
}


@settings(max_examples=60)
@given(requirements, st.lists(principals, min_size=1, max_size=3, unique_by=lambda p: p.key).map(tuple), superscopes)
async def test_a_route_answers_as_the_words_say(value, everybody, superscope):
    app = PolicyStack(answer, policies=[Known(everybody=everybody), Scopes(routes={"/": value}, superscope=superscope)])
    sent = await drive(app)
    problem = None if sent.status == 200 else sent.json()["error_code"]
    assert (sent.status, problem) == ANSWERS[interpreted(value, everybody, superscope)]


# --- with the policies that verify ------------------------------------------------------------------------------------

ROUTES = {
    "/token": FromIssuer(URL),
    "/key": FromApiKey(),
    "/one": FromIssuer(URL, scopes="x") | FromApiKey("y"),
    "/both": FromIssuer(URL, scopes="x") & FromApiKey("y"),
    "/scope-and-key": AllOf("x") & FromApiKey(),
    "/same": Both(FromIssuer(URL), FromApiKey(), same_subject=True),
    "/deputy": FromIssuer(URL, scopes="y") & FromApiKey(),
    "/plain": "y",
    "OPTIONS /both": FromApiKey(),
    "WEBSOCKET /feed": FromIssuer(URL) & FromApiKey(),
}
PREFLIGHT = {"origin": "https://app.example", "access-control-request-method": "POST"}


async def answer(scope, receive, send):
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        return
    ex = get_exchange(scope)
    known = {"acts": ex.principal and ex.principal.subject, "all": [p.subject for p in ex.principals]}
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(known).encode()})


def tokens(**options):
    issuers = [make_issuer(), make_issuer(url=OTHER)]
    return BearerAuth(**{"issuers": issuers, "conflicts_with": None, "realm": "tokens", **options})


def keys(**options):
    return ApiKeyAuth(**{"store": STORE, "pepper": PEPPER, "conflicts_with": None, "realm": "keys", **options})


def make_app(*outer, inner=(), **options):
    policies = [*(outer or (tokens(), keys())), *inner, Scopes(**{"routes": ROUTES, "public": ["/health"], **options})]
    return PolicyStack(answer, policies=policies, clock=FrozenClock(NOW))


def by_token(scope="x", **claims):
    return {"authorization": b"Bearer " + token(good_claims(scope=scope, **claims))}


def by_key(key=KEY):
    return {"x-api-key": key.get_secret_value()}


async def ask(path, headers, app=None, method="GET", **options):
    return await drive(app or make_app(), method, path, headers=headers, **options)


@pytest.mark.parametrize("outer", [(tokens(), keys()), (keys(), tokens())], ids=["token acts", "key acts"])
@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        pytest.param("/token", by_token(), 200, id="the issuer"),
        pytest.param("/token", by_token(iss=OTHER), 403, id="another issuer"),
        pytest.param("/token", by_key(), 401, id="a key for a token"),
        pytest.param("/token", by_key(ADMIN_KEY), 401, id="the superscope is no issuer"),
        pytest.param("/token", by_token("admin", iss=OTHER), 403, id="the superscope of another issuer"),
        pytest.param("/key", by_key(), 200, id="a key"),
        pytest.param("/key", by_token(), 401, id="a token for a key"),
        pytest.param("/one", by_token(), 200, id="either: the token"),
        pytest.param("/one", by_key(), 200, id="either: the key"),
        pytest.param("/one", by_token("y"), 403, id="either: the token, with the scope of the key"),
        pytest.param("/one", by_token("admin"), 200, id="either: the superscope of the token"),
        pytest.param("/one", {**by_token("y"), **by_key()}, 200, id="either: both presented, one fits"),
        pytest.param("/both", {**by_token(), **by_key()}, 200, id="both"),
        pytest.param("/both", by_token(), 401, id="both: the token alone"),
        pytest.param("/both", by_key(), 401, id="both: the key alone"),
        pytest.param("/both", by_token("x y admin"), 401, id="both: the superscope is no second credential"),
        pytest.param("/both", {**by_token("y"), **by_key()}, 403, id="both: a scope from the wrong one"),
        pytest.param("/both", {**by_token("admin"), **by_key()}, 200, id="both: the superscope of the token"),
        pytest.param("/both", {**by_token("y"), **by_key(ADMIN_KEY)}, 403, id="both: the key's superscope for a token"),
        pytest.param("/both", {**by_token(iss=OTHER), **by_key()}, 403, id="both: another issuer"),
        pytest.param("/deputy", {**by_token("x"), **by_key()}, 403, id="scopes are not added up"),
        pytest.param("/same", {**by_token(sub="ann"), **by_key(ANNS_KEY)}, 200, id="one subject"),
        pytest.param("/same", {**by_token(sub="eve"), **by_key(ANNS_KEY)}, 403, id="two subjects"),
        pytest.param("/same", by_token(sub="ann"), 401, id="one subject, one credential"),
        pytest.param("/both", {}, 401, id="nobody"),
        pytest.param("/health", {}, 200, id="public"),
        pytest.param("/both/./x", {**by_token(), **by_key()}, 400, id="a dot segment"),
    ],
)
async def test_who_may_pass(outer, path, headers, status):
    for method in ("GET", "HEAD", "POST"):
        sent = await ask(path, headers, make_app(*outer), method)
        assert sent.status == status, sent.body
        assert sent.header_lines("www-authenticate") or status != 401


async def test_the_outermost_acts_and_plain_rules_ask_only_who_acts():
    both = {**by_token("x", sub="ann"), **by_key()}
    token_acts, key_acts = make_app(), make_app(keys(), tokens())
    assert (await ask("/both", both, token_acts)).json() == {"acts": "ann", "all": ["ann", "till"]}
    assert (await ask("/both", both, key_acts)).json() == {"acts": "till", "all": ["till", "ann"]}
    assert (await ask("/plain", both, token_acts)).status == 403
    assert (await ask("/plain", both, key_acts)).status == 200
    assert (await ask("/scope-and-key", both, token_acts)).status == 200
    assert (await ask("/scope-and-key", both, key_acts)).status == 403


BEARER, AS_KEY = ['Bearer realm="tokens"'], ['Bearer realm="keys"', 'ApiKey realm="keys"']


@pytest.mark.parametrize("outer", [(tokens(), keys()), (keys(), tokens())], ids=["token acts", "key acts"])
async def test_who_lacks_a_credential_is_asked_for_that_one(outer):
    """RFC 9110 section 11.6.1."""
    app = make_app(*outer)
    for headers, lines in (({}, BEARER + AS_KEY), (by_token(), AS_KEY), (by_key(), BEARER)):
        sent = await ask("/both", headers, app)
        assert sent.json()["error_code"] == "AUTH_001"
        assert sorted(sent.header_lines("www-authenticate")) == sorted(lines)
        assert sent.header("cache-control") == "no-store"


async def test_with_conflicts_refused_one_of_two_kinds_is_asked_for_all_the_same():
    for outer in ((tokens(conflicts_with="X-API-Key"), keys()), (keys(conflicts_with="Authorization"), tokens())):
        app = make_app(*outer)
        assert (await ask("/both", {**by_token(), **by_key()}, app)).json()["error_code"] == "AUTH_006"
        for path, headers, status in (
            ("/one", by_token(), 200), ("/one", by_key(), 200), ("/key", by_token(), 401), ("/token", by_key(), 401),
        ):  # fmt: skip
            sent = await ask(path, headers, app)
            assert sent.status == status
            assert sent.header_lines("www-authenticate") or status == 200


async def test_who_lacks_scopes_learns_which_of_which_credential():
    """RFC 6750 section 3.1."""
    sent = await ask("/both", {**by_token("a"), **by_key(ADMIN_KEY)})
    assert sent.header("www-authenticate") == 'Bearer realm="tokens", error="insufficient_scope", scope="x"'
    body = sent.json()
    assert (body["required_scopes"], body["missing_scopes"]) == (["x"], ["x"])
    assert body["detail"] == "This route takes the scope x of the token"
    app = make_app(routes={"/": FromIssuer(URL, scopes=["p", "x"]) & FromApiKey(AnyOf("q", "r")) & "s"})
    body = (await ask("/", {**by_token("x"), **by_key()}, app)).json()
    assert body["detail"] == (
        "This route takes the scopes p, x of the token and one of the scopes q, r of the API key and the scope s"
    )
    assert body["required_scopes"] == ["p", "x", "q", "r", "s"] and body["missing_scopes"] == ["p", "q", "r", "s"]


async def test_the_wrong_issuer_learns_nothing_of_the_right_one():
    sent = await ask("/token", by_token(iss=OTHER))
    assert sent.status == 403 and sent.json()["error_code"] == "REQ_403"
    assert URL not in sent.body.decode() and not sent.header_lines("www-authenticate")
    same = await ask("/same", {**by_token(sub="eve"), **by_key()})
    assert same.json()["detail"] == sent.json()["detail"]


@pytest.mark.parametrize("outer", [(tokens(), keys()), (keys(), tokens())], ids=["token acts", "key acts"])
async def test_a_credential_that_is_wrong_is_refused_beside_a_right_one(outer):
    wrong_token, wrong_key = {"authorization": "Bearer a.b.c"}, {"x-api-key": KEY.get_secret_value()[:-1]}
    for headers, code in (
        ({**by_token(), **wrong_key}, "AUTH_005"),
        ({**wrong_token, **by_key()}, "AUTH_002"),
        ({"authorization": "Bearer", **by_key()}, "AUTH_003"),
    ):
        for path in ("/both", "/one", "/plain", "/health"):
            sent = await ask(path, headers, make_app(*outer))
            assert (sent.status >= 400, sent.json()["error_code"]) == (True, code)


async def test_another_scheme_beside_a_key_is_nobodys_credential():
    sent = await ask("/both", {"authorization": "Basic YTpi", **by_key()}, make_app(keys(), tokens()))
    assert (sent.status, sent.header_lines("www-authenticate")) == (401, BEARER)


async def test_preflights_and_websockets_obey_the_rules_of_today():
    assert (await ask("/one", PREFLIGHT, method="OPTIONS")).status == 200
    assert (await ask("/both", PREFLIGHT, method="OPTIONS")).status == 401, "a rule that names OPTIONS"
    both = {**by_token(), **by_key()}
    assert (await ask("/feed", both, kind="websocket")).messages[0]["type"] == "websocket.accept"
    assert (await ask("/feed", by_token(), kind="websocket")).status == 401
    assert (await ask("/feed", {**both, **by_token(iss=OTHER)}, kind="websocket")).status == 403


async def test_a_policy_further_in_verifies_again_and_the_newest_counts():
    """An inner policy may trust fewer; what the outer one made of the same token or key no longer vouches."""
    narrower = BearerAuth(
        issuers=[make_issuer(scope_claims={"scp": "array"})], conflicts_with=None
    )  # of the same token, no scopes
    both = {**by_token("x"), **by_key()}
    assert (await ask("/both", both, make_app(keys(), tokens(), narrower))).status == 403
    assert (await ask("/both", both, make_app(tokens(), keys(), narrower))).status == 403
    sent = await ask("/key", both, make_app(keys(), tokens(), narrower, keys()))
    assert sent.json() == {"acts": "till", "all": ["till", "user_123"]}, "none twice"
    fewer = keys(store=MemoryApiKeyStore([ANNS_RECORD]))
    assert (await ask("/both", both, make_app(tokens(), keys(), fewer))).status == 401


async def test_a_cosigner_can_be_revoked():
    for outer in ((tokens(), keys()), (keys(), tokens())):
        for subject, issuer, code in (("user_123", URL, "AUTH_002"), ("till", None, "AUTH_005")):
            revocations = MemoryRevocations()
            app = make_app(*outer, inner=[Revocation(store=revocations)])
            both = {**by_token(), **by_key()}
            assert (await ask("/both", both, app)).status == 200
            await revocations.revoke(subject=subject, issuer=issuer)
            sent = await ask("/both", both, app)
            assert (sent.status, sent.json()["error_code"]) == (401, code)


async def test_a_missing_second_credential_is_no_failed_authentication():
    limit = AuthFailureLimit(addresses="3/hour", credentials=None, everywhere=None)
    app = make_app(limit, tokens(), keys())
    assert [(await ask("/both", by_token(), app)).status for _ in range(5)] == [401] * 5
    assert (await ask("/both", {**by_token(), **by_key()}, app)).status == 200
    wrong = {**by_token(), "x-api-key": "sk_live_wrong"}
    assert [(await ask("/both", wrong, app)).status for _ in range(4)] == [401, 401, 401, 429]


async def test_keys_are_not_tried_out_under_the_cover_of_a_token():
    guess = {"x-api-key": new_key(pepper=SecretStr("q" * 32), subject="eve").plain.get_secret_value()}
    app = make_app(AuthFailureLimit(addresses="100/hour", credentials="2/hour", everywhere=None), tokens(), keys())
    statuses = []
    for place in range(4):
        another = {"authorization": b"Bearer " + token(header={"kid": str(place)})}
        statuses.append((await ask("/both", {**another, **guess}, app)).status)
    assert statuses == [401, 401, 429, 429]


async def test_who_cosigns_is_known_once_and_never_acts():
    seen = []
    ann, key = Principal(subject="ann", issuer=URL), Principal(subject="till", kind="api_key")
    newer = Principal(subject="till", kind="api_key", scopes=frozenset("y"))

    class Watch(Policy):
        def on_request(self, ex):
            seen.append(ex.principals)
            for principal in (ann, key, newer):
                ex.cosign(principal)
                seen.append(ex.principals)

    assert (await drive(PolicyStack(answer, policies=[Watch()]))).json() == {"acts": "ann", "all": ["ann", "till"]}
    assert seen == [(), (ann,), (ann, key), (ann, newer)]


async def test_a_rule_of_scopes_asks_for_no_cosigner(monkeypatch):
    """What knows nothing of the algebra pays nothing for it."""
    app = make_app()
    monkeypatch.setattr(Scopes, "_judge", None)
    assert (await ask("/plain", by_token("y"), app)).status == 200
    assert (await ask("/plain", by_token("admin"), app)).status == 200
    assert (await ask("/elsewhere", by_token(), app)).status == 200


async def test_two_of_scopes_in_one_stack_both_hold():
    app = make_app(inner=[Scopes(routes={"/both": FromApiKey()})])
    assert (await ask("/both", {**by_token(), **by_key()}, app)).status == 200
    assert (await ask("/both", by_token(), app)).status == 401
