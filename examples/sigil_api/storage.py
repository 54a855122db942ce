"""Agents, memories, evaluations and operations in SQLite: a file, or in memory for as long as the service runs.

    storage = Storage("agents.db")
    storage.create_agent(CreateAgent(name="sales_qualifier", stratum="RAI", description="Qualifies leads"))
    storage.close()

One connection behind one lock. The endpoints that come here are plain functions, which FastAPI runs in its thread pool:
the event loop never waits for the disk, and no two threads are ever inside SQLite at the same time.
"""

import json
import sqlite3
import threading
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from typing import Any

from examples.sigil_api.models import (
    Agent,
    AgentQuery,
    AgentStatus,
    AgentSummary,
    CreateAgent,
    Evaluation,
    Memory,
    Operation,
    StoreMemory,
    TokensUsed,
)
from sigil_policy.core.clock import SYSTEM_CLOCK, Clock

_SCHEMA = """
CREATE TABLE IF NOT EXISTS agents (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, stratum TEXT NOT NULL, description TEXT NOT NULL,
    system_prompt TEXT, status TEXT NOT NULL, version TEXT NOT NULL, runs INTEGER NOT NULL DEFAULT 0, last_run_at TEXT,
    created_at TEXT NOT NULL, updated_at TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS memories (
    id INTEGER PRIMARY KEY, memory_id TEXT NOT NULL UNIQUE, agent_name TEXT, content TEXT NOT NULL, tags TEXT NOT NULL,
    created_at TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS evaluations (
    id INTEGER PRIMARY KEY, evaluation_id TEXT NOT NULL UNIQUE, agent_name TEXT NOT NULL, agent_version TEXT NOT NULL,
    scores TEXT NOT NULL, tokens_used TEXT NOT NULL, created_at TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS operations (
    id INTEGER PRIMARY KEY, operation_id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, status TEXT NOT NULL, result TEXT,
    error TEXT, created_at TEXT NOT NULL, updated_at TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS changes (collection TEXT PRIMARY KEY, at TEXT NOT NULL);
"""
_RECOVERY = "UPDATE operations SET status = 'failed', error = 'the service was restarted' WHERE status = 'running'"

_SUMMARY = "name, stratum, description, status, version, created_at, updated_at"
_AGENT = f"{_SUMMARY}, system_prompt"
# What a search in memory reads at most: the newest are the most likely to matter.
_RECENT = 1_000


class NameTakenError(Exception):
    """There is an agent of this name already."""


class Storage:
    """The data; `shared` says that other processes work on the same file, so that what runs may be theirs."""

    def __init__(self, database: str = ":memory:", clock: Clock = SYSTEM_CLOCK, *, shared: bool = False) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(database, check_same_thread=False)
        self._connection.row_factory = sqlite3.Row
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = NORMAL")
        self._connection.executescript(_SCHEMA)
        with self._transaction() as run:
            if not shared:
                run.execute(_RECOVERY)
            run.execute("INSERT OR IGNORE INTO changes VALUES ('agents', ?)", (self._now(),))

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    # --- agents ---------------------------------------------------------------------------------------------

    def agents(self, query: AgentQuery) -> tuple[list[AgentSummary], int, datetime]:
        """One page of the agents that match, how many match in all, and when any agent changed last."""
        conditions, values = _conditions(query)
        where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
        # Field names come from a closed list (models.SORTABLE); values are bound. The last key makes the order total.
        order = ", ".join(
            f"{field.removeprefix('-')}{' DESC' if field.startswith('-') else ''}" for field in query.sort.split(",")
        )
        page = f"SELECT {_SUMMARY} FROM agents{where} ORDER BY {order}, id LIMIT ? OFFSET ?"  # noqa: S608
        with self._transaction() as run:
            (total,) = run.execute(f"SELECT count(*) FROM agents{where}", values).fetchone()  # noqa: S608
            rows = run.execute(page, [*values, query.per_page, (query.page - 1) * query.per_page]).fetchall()
            (changed,) = run.execute("SELECT at FROM changes WHERE collection = 'agents'").fetchone()
        return [AgentSummary(**row) for row in rows], total, datetime.fromisoformat(changed)

    def agent(self, name: str) -> Agent | None:
        with self._transaction() as run:
            row = run.execute(f"SELECT {_AGENT} FROM agents WHERE name = ?", (name,)).fetchone()  # noqa: S608
        return Agent(**row) if row else None

    def agent_status(self, name: str) -> tuple[AgentStatus, datetime] | None:
        """The status of the agent and when it changed last."""
        with self._transaction() as run:
            row = run.execute(
                "SELECT name AS agent_name, status, version, runs, last_run_at, "
                "max(updated_at, coalesce(last_run_at, '')) AS changed FROM agents WHERE name = ?",
                (name,),
            ).fetchone()
        return (AgentStatus(**row), datetime.fromisoformat(row["changed"])) if row else None

    def create_agent(self, new: CreateAgent) -> Agent:
        now = self._now()
        values = {**new.model_dump(), "status": "active", "version": "1.0.0", "created_at": now, "updated_at": now}
        with self._transaction() as run:
            try:
                run.execute(
                    f"INSERT INTO agents ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})",  # noqa: S608
                    [*values.values()],
                )
            except sqlite3.IntegrityError:
                raise NameTakenError from None
            self._agents_changed(run, now)
        return Agent(**values)

    def patch_agent(self, name: str, changes: dict[str, str | None]) -> Agent | None:
        """The agent after the change; its version goes up if anything did change. None if there is no such agent."""
        now = self._now()
        with self._transaction() as run:
            row = run.execute(f"SELECT {_AGENT} FROM agents WHERE name = ?", (name,)).fetchone()  # noqa: S608
            if row is None:
                return None
            agent = Agent(**row)
            changed = {key: value for key, value in changes.items() if getattr(agent, key) != value}
            if not changed:
                return agent
            major, minor, patch = agent.version.split(".")
            changed |= {"version": f"{major}.{minor}.{int(patch) + 1}", "updated_at": now}
            run.execute(
                f"UPDATE agents SET {', '.join(f'{key} = ?' for key in changed)} WHERE name = ?",  # noqa: S608
                [*changed.values(), name],
            )
            self._agents_changed(run, now)
        return Agent(**{**row, **changed})

    def delete_agent(self, name: str) -> bool:
        """Whether there was such an agent; its memories and evaluations go with it."""
        with self._transaction() as run:
            gone = run.execute("DELETE FROM agents WHERE name = ?", (name,)).rowcount == 1
            if gone:
                run.execute("DELETE FROM memories WHERE agent_name = ?", (name,))
                run.execute("DELETE FROM evaluations WHERE agent_name = ?", (name,))
                self._agents_changed(run, self._now())
        return gone

    def record_run(self, name: str) -> None:
        with self._transaction() as run:
            run.execute("UPDATE agents SET runs = runs + 1, last_run_at = ? WHERE name = ?", (self._now(), name))

    # --- memory ---------------------------------------------------------------------------------------------

    def remember(self, new: StoreMemory) -> Memory:
        made = Memory(memory_id=_new_id("mem"), created_at=self._instant(), **new.model_dump())
        with self._transaction() as run:
            run.execute(
                "INSERT INTO memories (memory_id, agent_name, content, tags, created_at) VALUES (?, ?, ?, ?, ?)",
                (made.memory_id, made.agent_name, made.content, json.dumps(made.tags), _text(made.created_at)),
            )
        return made

    def memory(self, memory_id: str) -> Memory | None:
        with self._transaction() as run:
            row = run.execute("SELECT * FROM memories WHERE memory_id = ?", (memory_id,)).fetchone()
        return Memory(**_decoded(row, "tags")) if row else None

    def memories(self, agent_name: str | None) -> list[Memory]:
        """The newest memories of an agent, or of all."""
        with self._transaction() as run:
            rows = run.execute(
                "SELECT * FROM memories WHERE ?1 IS NULL OR agent_name = ?1 ORDER BY id DESC LIMIT ?2",
                (agent_name, _RECENT),
            ).fetchall()
        return [Memory(**_decoded(row, "tags")) for row in rows]

    # --- evolution ------------------------------------------------------------------------------------------

    def add_evaluation(self, agent: Agent, scores: dict[str, float], used: TokensUsed) -> Evaluation:
        made = Evaluation(
            evaluation_id=_new_id("eval"),
            agent_name=agent.name,
            agent_version=agent.version,
            scores=scores,
            tokens_used=used,
            created_at=self._instant(),
        )
        with self._transaction() as run:
            run.execute(
                "INSERT INTO evaluations (evaluation_id, agent_name, agent_version, scores, tokens_used, created_at) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (
                    made.evaluation_id,
                    made.agent_name,
                    made.agent_version,
                    json.dumps(scores),
                    used.model_dump_json(),
                    _text(made.created_at),
                ),
            )
        return made

    def evaluation(self, evaluation_id: str) -> Evaluation | None:
        with self._transaction() as run:
            row = run.execute("SELECT * FROM evaluations WHERE evaluation_id = ?", (evaluation_id,)).fetchone()
        return Evaluation(**_decoded(row, "scores", "tokens_used")) if row else None

    def evaluations(self, agent_name: str | None) -> list[Evaluation]:
        """The newest hundred, of one agent or of all."""
        with self._transaction() as run:
            rows = run.execute(
                "SELECT * FROM evaluations WHERE ?1 IS NULL OR agent_name = ?1 ORDER BY id DESC LIMIT 100",
                (agent_name,),
            ).fetchall()
        return [Evaluation(**_decoded(row, "scores", "tokens_used")) for row in rows]

    def start_operation(self, kind: str) -> Operation:
        now = self._instant()
        made = Operation(operation_id=_new_id("op"), kind=kind, status="running", created_at=now, updated_at=now)
        with self._transaction() as run:
            run.execute(
                "INSERT INTO operations (operation_id, kind, status, created_at, updated_at) VALUES (?, ?, ?, ?, ?)",
                (made.operation_id, kind, made.status, _text(now), _text(now)),
            )
        return made

    def end_operation(
        self, operation_id: str, *, result: dict[str, Any] | None = None, error: str | None = None
    ) -> None:
        with self._transaction() as run:
            run.execute(
                "UPDATE operations SET status = ?, result = ?, error = ?, updated_at = ? WHERE operation_id = ?",
                (
                    "completed" if error is None else "failed",
                    json.dumps(result) if result is not None else None,
                    error,
                    self._now(),
                    operation_id,
                ),
            )

    def operation(self, operation_id: str) -> Operation | None:
        with self._transaction() as run:
            row = run.execute("SELECT * FROM operations WHERE operation_id = ?", (operation_id,)).fetchone()
        return Operation(**_decoded(row, "result")) if row else None

    # --------------------------------------------------------------------------------------------------------

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Cursor]:
        """Everything inside happens, or nothing of it; one at a time."""
        with self._lock, self._connection, closing(self._connection.cursor()) as cursor:
            yield cursor

    def _agents_changed(self, run: sqlite3.Cursor, now: str) -> None:
        # A deleted agent takes its own time with it, so the time of the collection is kept apart.
        run.execute("UPDATE changes SET at = max(at, ?) WHERE collection = 'agents'", (now,))

    def _instant(self) -> datetime:
        return datetime.fromtimestamp(self._clock.time(), UTC)

    def _now(self) -> str:
        return _text(self._instant())


def _conditions(query: AgentQuery) -> tuple[list[str], list[Any]]:
    wanted: list[tuple[str, Any]] = []
    if query.stratum is not None:
        wanted.append(("stratum = ?", query.stratum))
    if query.status is not None:
        wanted.append(("status = ?", query.status))
    if query.q is not None:
        wanted.append(("instr(lower(name || ' ' || description), lower(?)) > 0", query.q))
    if query.created_after is not None:
        wanted.append(("created_at >= ?", _text(query.created_after)))
    if query.created_before is not None:
        wanted.append(("created_at < ?", _text(query.created_before)))
    return [condition for condition, _ in wanted], [value for _, value in wanted]


def _text(instant: datetime) -> str:
    # Of one length and in one zone, so that comparing texts compares instants.
    return instant.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _decoded(row: sqlite3.Row, *columns: str) -> dict[str, Any]:
    return {**row, **{name: json.loads(row[name]) for name in columns if row[name] is not None}}


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
