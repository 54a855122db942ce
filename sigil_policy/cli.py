"""The command `sigil-policy`: API keys made, listed, rotated and revoked.

    export SIGIL_PEPPER="$(cat pepper)" SIGIL_KEY_STORE=sqlite:///keys.db
    sigil-policy key new --owner nightly-job --tier pro --scope "agents:read agents:write" --expires 90d
    sigil-policy key list
    sigil-policy key rotate 4fGhT2aB9xQz --overlap 24h
    sigil-policy key revoke 4fGhT2aB9xQz

`key new` and `key rotate` print the key alone on the last line: its only copy. With `--json` the whole answer is one
JSON value on one line. `sigil_policy.identity.api_keys.ApiKeys` does the same in Python.

| option | what it is |
|---|---|
| `--store URL` | `sqlite:///keys.db`, `redis://...`, `file:keys.jsonl`, `file:keys.toml`; default: `SIGIL_KEY_STORE` |
| `--pepper-env NAME` | the variable that holds the pepper (default `SIGIL_PEPPER`); for `new` and `rotate` |
| `--pepper-file PATH` | a file that holds it |

The pepper is never an argument, and a store's URL with a password should be none either: arguments are in the list of
processes and in the shell's history.

| exit code | what it says |
|---|---|
| 0 | done |
| 1 | not done: the message says why, and what to do |
| 2 | the arguments are wrong |
| 3 | the store is away: try again; a `new` or `rotate` may have been done, `key list` tells |
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import anyio
import structlog
from pydantic import SecretStr, ValidationError

from sigil_policy.core.clock import SYSTEM_CLOCK
from sigil_policy.identity.api_keys import (
    ApiKeyLedger,
    ApiKeyRecord,
    ApiKeys,
    ApiKeyUnknownError,
    NewKey,
    ReadOnlyStoreError,
    TomlApiKeyStore,
    key_id,
    new_key,
)
from sigil_policy.identity.api_keys.files import as_toml
from sigil_policy.identity.api_keys.format import ID
from sigil_policy.identity.api_keys.urls import open_key_store
from sigil_policy.stores.limits import StoreUnavailableError

DONE, NOT_DONE, WRONG_ARGUMENTS, STORE_AWAY = 0, 1, 2, 3

_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_DURATION = re.compile(rf"(\d{{1,9}})([{''.join(_UNITS)}])")
# Seconds; who types a command waits longer than a request.
_DEADLINE = 5.0
_MAX_PEPPER = 65_536


class CommandError(Exception):
    """Why a command was not done, and what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments` (None: those of the process); returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        answer = anyio.run(partial(_COMMANDS[options.command], options))
    except (StoreUnavailableError, OSError) as error:
        said = str(error) if isinstance(error, StoreUnavailableError) else (error.strerror or type(error).__name__)
        return _fail(f"the key store is away: {said}", STORE_AWAY)
    except ValidationError as error:
        # Its own text would show where in the code; these say which option.
        return _fail("; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()), NOT_DONE)
    except ApiKeyUnknownError as error:
        return _fail(f"{error.args[0]} in this store; 'sigil-policy key list' shows all", NOT_DONE)
    except (CommandError, ReadOnlyStoreError, ValueError, ImportError) as error:
        return _fail(str(error), NOT_DONE)
    sys.stdout.write(f"{answer}\n")
    sys.stdout.flush()
    return DONE


async def _new(options: argparse.Namespace) -> str:
    store, pepper = _store(options), _pepper(options)
    scopes = " ".join(options.scope).split()
    if isinstance(store, TomlApiKeyStore):
        now = SYSTEM_CLOCK.time()
        made = new_key(
            pepper=pepper,
            subject=options.owner,
            scopes=scopes,
            tier=options.tier,
            created=now,
            expires=None if options.expires is None else now + options.expires,
            prefix=options.prefix,
        )
        said = f"Add this to {store.path}:\n\n{as_toml(made.record)}\n"
        return _shown(made, options.json, said, {"toml": as_toml(made.record)})
    keys = ApiKeys(store, pepper=pepper, prefix=options.prefix)
    try:
        made = await keys.new(options.owner, scopes=scopes, tier=options.tier, lifetime=options.expires)
    finally:
        await _close(store)
    return _shown(made, options.json, "", {})


async def _rotate(options: argparse.Namespace) -> str:
    store, old = _there(options), _id(options.id)
    keys = ApiKeys(store, pepper=_pepper(options))
    try:
        made = await keys.rotate(old, overlap=options.overlap, lifetime=options.expires)
        ends = None
        # The new key is stored: whatever happens now, its only copy is to be printed.
        with suppress(StoreUnavailableError, OSError):
            ends = await store.get(old)
    finally:
        await _close(store)
    until = None if ends is None else _moment(ends.expires)
    return _shown(
        made,
        options.json,
        f"Key {old} holds until {until or 'the overlap is over'}.",
        {"replaces": old, "replaced_until": until},
    )


async def _revoke(options: argparse.Namespace) -> str:
    store, old = _there(options), _id(options.id)
    try:
        record = await ApiKeys(store).revoke(old)
    finally:
        await _close(store)
    if options.json:
        return json.dumps(_fields(record))
    within = getattr(store, "fresh_for", 1)
    said = f"Key {old} of {record.subject} ended at {_moment(record.expires)}."
    return f"{said} By default servers refuse it within {within:g} s."


async def _list(options: argparse.Namespace) -> str:
    store = _there(options)
    try:
        records = await ApiKeys(store).list(options.owner)
    finally:
        await _close(store)
    if options.json:
        return json.dumps([_fields(record) for record in records])
    if not records:
        return "There are no keys."
    rows: list[tuple[str, ...]] = [
        ("ID", "PREFIX", "OWNER", "TIER", "SCOPES", "CREATED", "EXPIRES", "LAST USED", "STATE")
    ]
    for record in records:
        fields = _fields(record)
        names = ("created", "expires", "last_used", "state")
        scopes = " ".join(fields["scopes"])
        rows.append((record.id, record.prefix, record.subject, record.tier or "", scopes, *(_cell(fields, names))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


_COMMANDS = {"new": _new, "list": _list, "rotate": _rotate, "revoke": _revoke}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sigil-policy", description="API keys: made, listed, rotated and revoked.")
    topics = parser.add_subparsers(required=True, metavar="key")
    commands = topics.add_parser("key", help="API keys").add_subparsers(
        required=True, dest="command", metavar="new|list|rotate|revoke"
    )
    store = argparse.ArgumentParser(add_help=False)
    store.add_argument(
        "--store",
        default=os.environ.get("SIGIL_KEY_STORE"),
        metavar="URL",
        help="sqlite:///keys.db, redis://host:6379/0, file:keys.jsonl or file:keys.toml (default: $SIGIL_KEY_STORE)",
    )
    store.add_argument("--json", action="store_true", help="answer with one JSON value")
    pepper = argparse.ArgumentParser(add_help=False)
    source = pepper.add_mutually_exclusive_group()
    source.add_argument("--pepper-env", default="SIGIL_PEPPER", metavar="NAME", help="variable that holds the pepper")
    source.add_argument("--pepper-file", metavar="PATH", help="file that holds the pepper")

    new = commands.add_parser("new", parents=[store, pepper], help="make a key, and print its only copy")
    new.add_argument("--owner", required=True, help="who calls with it: the subject")
    new.add_argument("--scope", action="append", default=[], metavar='"A B"', help="what it may do; may be repeated")
    new.add_argument("--tier", help="the name of its limits")
    new.add_argument("--expires", type=_duration, metavar="90d", help="for how long it holds (default: until revoked)")
    new.add_argument("--prefix", default="sk_live", help="how it begins (default: sk_live; for tests: sk_test)")

    rotate = commands.add_parser("rotate", parents=[store, pepper], help="make a key in place of another")
    rotate.add_argument("id", help="the old key's id")
    rotate.add_argument("--overlap", type=_duration, default=86_400.0, metavar="24h", help="the old one holds so long")
    rotate.add_argument("--expires", type=_duration, metavar="90d", help="for how long it holds (default: as the old)")

    revoke = commands.add_parser("revoke", parents=[store], help="end a key now")
    revoke.add_argument("id", help="the key's id")

    listing = commands.add_parser("list", parents=[store], help="show all keys, without secrets")
    listing.add_argument("--owner", help="only this one's")
    return parser


def _duration(text: str) -> float:
    found = _DURATION.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: write 90d, 12h, 30m or 45s")
    return float(int(found[1]) * _UNITS[found[2]])


def _store(options: argparse.Namespace) -> ApiKeyLedger:
    if not options.store:
        raise CommandError("which store? Give --store sqlite:///keys.db, or set SIGIL_KEY_STORE")
    return open_key_store(options.store, deadline=_DEADLINE)


def _there(options: argparse.Namespace) -> ApiKeyLedger:
    store = _store(options)
    path = getattr(store, "path", None)
    if isinstance(path, Path) and not path.exists():
        raise CommandError(f"there is no {path}; 'sigil-policy key new' makes it")
    return store


async def _close(store: Any) -> None:
    if hasattr(store, "aclose"):
        await store.aclose()


def _pepper(options: argparse.Namespace) -> SecretStr:
    if options.pepper_file is not None:
        try:
            with Path(options.pepper_file).open("rb") as file:
                text = file.read(_MAX_PEPPER).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise CommandError(f"the pepper file cannot be read: {type(error).__name__}") from None
        return SecretStr(text.strip())
    text = os.environ.get(options.pepper_env, "")
    if not text:
        raise CommandError(
            f"the pepper is missing: set {options.pepper_env}, or give --pepper-file. It is the one of ApiKeyAuth; "
            "python -c 'import secrets; print(secrets.token_urlsafe(32))' makes a first one"
        )
    return SecretStr(text)


def _id(text: str) -> str:
    if re.fullmatch(ID, text):
        return text
    known = key_id(text.encode("utf-8", "surrogateescape"))
    if known is not None:
        raise CommandError(f"this is a whole key, which belongs in no command: it may have leaked. Its id is {known}")
    raise CommandError("an id is the 12 letters and digits after the prefix of a key; 'sigil-policy key list' shows it")


def _shown(made: NewKey, as_json: bool, said: str, more: dict[str, Any]) -> str:
    plain = made.plain.get_secret_value()
    fields = _fields(made.record)
    if as_json:
        return json.dumps({"key": plain, **fields, **more})
    lines = [f"{name:<8} {fields[name] or '-'}" for name in ("id", "owner", "tier", "expires")]
    lines.insert(3, f"{'scopes':<8} {' '.join(fields['scopes']) or '-'}")
    return "\n".join([*([said] if said else []), *lines, "The key, which is nowhere else:", plain])


def _fields(record: ApiKeyRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "prefix": record.prefix,
        "owner": record.subject,
        "tier": record.tier,
        "scopes": sorted(record.scopes),
        "created": _moment(record.created),
        "expires": _moment(record.expires),
        "last_used": _moment(record.last_used),
        "state": "ended" if record.is_expired(SYSTEM_CLOCK.time()) else "active",
    }


def _cell(fields: dict[str, Any], names: Iterable[str]) -> Iterable[str]:
    return (str(fields[name] or "-") for name in names)


def _moment(at: float | None) -> str | None:
    if at is None:
        return None
    try:
        return datetime.fromtimestamp(int(at), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return "9999-12-31T23:59:59Z"  # later than a date can say


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"sigil-policy: {message}\n")
    return code


def run() -> NoReturn:
    """The entry point of the command."""
    # What is logged goes where messages go: the answer may be read by a program.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(file=sys.stderr))
    sys.exit(main())


if __name__ == "__main__":
    run()
