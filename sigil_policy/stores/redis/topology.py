"""Which server to ask: the one of the URL, the primary that sentinels name, or the node that owns a key.

Guarantees: a run goes to the node that owns the hash slot of its first key, by the map of the cluster (`CLUSTER
SLOTS`) and what `MOVED` corrects of it. The map is read anew, by one task and at most every 0.2 s, when a run was
redirected and when a node cannot be reached, from any node that answers. Sentinels are asked again before each
connection.
"""

import asyncio
import random
from binascii import crc_hqx
from typing import TYPE_CHECKING, Any

import structlog

from sigil_policy.stores.redis.address import Endpoint
from sigil_policy.stores.redis.connection import Nobody, Run, ServerError, connect
from sigil_policy.stores.redis.node import Gate, Node

if TYPE_CHECKING:
    from sigil_policy.stores.redis.line import Line

logger = structlog.get_logger("sigil_policy")

SLOTS = 16_384
_PAUSE = 0.2
# How many nodes are asked for the map, or sentinels for the primary, in one attempt.
_ASKED = 8


def slot_of(key: bytes) -> int:
    """The hash slot of a key: of its hash tag, if it has one (Redis Cluster specification, "Hash tags")."""
    start = key.find(b"{") + 1
    if start:
        end = key.find(b"}", start)
        if end > start:
            key = key[start:end]
    return crc_hqx(key, 0) % SLOTS


def find_route(line: "Line") -> Gate:
    """The gate through which all runs of `line` go."""
    address = line.address
    if address.kind == "cluster":
        return Cluster(line)
    endpoint = address.endpoints[0]

    async def fixed() -> Endpoint:
        return endpoint

    async def primary() -> Endpoint:
        return await find_primary(line)

    node = Node(line, str(address), primary if address.kind == "sentinel" else fixed)
    line.nodes.append(node)
    return node


async def find_primary(line: "Line") -> Endpoint:
    """Ask the sentinels, one after the other. Raises what the last one failed with."""
    address = line.address
    endpoints = random.sample(address.endpoints, min(len(address.endpoints), _ASKED))
    failure: Exception = ConnectionError("no sentinel answered")
    for endpoint in endpoints:
        try:
            async with asyncio.timeout(line.settings.connect_timeout / (len(endpoints) + 1)):
                answer = await _ask(line, endpoint, b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", address.service)
        except (OSError, ServerError) as error:
            failure = error
        else:
            if isinstance(answer, list) and len(answer) == 2:
                return Endpoint(answer[0].decode(), int(answer[1]))
            failure = ConnectionError(f"the sentinel at {endpoint} knows no primary of that name")
    raise failure


async def _ask(line: "Line", endpoint: Endpoint, *command: bytes | str) -> Any:
    credentials = line.address.sentinels if line.address.kind == "sentinel" else line.address.credentials
    connection = await connect(
        endpoint, line.address, Nobody(), max_reply=line.settings.max_reply, credentials=credentials
    )
    try:
        return await connection.ask(*command)
    finally:
        connection.drop("it was asked what was to be asked")


class Cluster(Gate):
    """The map of a cluster: which node owns a hash slot."""

    def __init__(self, line: "Line") -> None:
        super().__init__(line, str(line.address))
        self._owners: list[Node | None] = [None] * SLOTS
        self._nodes: dict[Endpoint, Node] = {}
        self._mapped_at = float("-inf")

    def write(self, runs: list[Run]) -> None:
        owners = self._owners
        shares: dict[Node | None, list[Run]] = {}
        for run in runs:
            # A script without keys may run anywhere.
            shares.setdefault(owners[slot_of(run.keys[0]) if run.keys else 0], []).append(run)
        for node, share in shares.items():
            if node is not None:
                node.write(share)
                continue
            for run in share:
                run.gate = self
            if self.refresh():
                self.waiting += share
            else:
                self.refuse(share)

    def refresh(self) -> bool:
        """Read the map anew; False if that has just been done, or cannot be done."""
        if self.breaker.is_open:
            return False
        if self._task is None and self.line.loop.time() - self._mapped_at < _PAUSE:
            return False
        self.start()
        return True

    async def make(self) -> None:
        line = self.line
        connected = [endpoint for endpoint, node in self._nodes.items() if node.connection is not None]
        others = [*self._nodes, *line.address.endpoints]
        random.shuffle(others)
        endpoints = list(dict.fromkeys(connected + others))[:_ASKED]
        failure: Exception = ConnectionError("no node of the cluster answered")
        for endpoint in endpoints:
            try:
                async with asyncio.timeout(line.settings.connect_timeout / (len(endpoints) + 1)):
                    self._take(await _ask(line, endpoint, b"CLUSTER", b"SLOTS"), endpoint)
            except (OSError, ServerError) as error:
                failure = error
            else:
                return
        raise failure

    def _take(self, rows: list[Any], asked: Endpoint) -> None:
        owners: list[Node | None] = [None] * SLOTS
        for start, end, primary, *_ in rows:
            # A node that does not know its own name means the one by which we reached it.
            host = primary[0].decode() if primary[0] else asked.host
            if host != "?":
                owners[start : end + 1] = [self._node(Endpoint(host, primary[1]))] * (end + 1 - start)
        self._owners = owners
        self._mapped_at = self.line.loop.time()
        used = set(owners)
        for endpoint, node in self._nodes.copy().items():
            if node not in used and (node.breaker.is_open or not node.in_flight()):
                self._forget(endpoint, node)

    def _node(self, endpoint: Endpoint) -> Node:
        node = self._nodes.get(endpoint)
        if node is None:

            async def locate() -> Endpoint:
                return endpoint

            node = Node(self.line, str(endpoint), locate, home=self, probe_key=self._key_of)
            self._nodes[endpoint] = node
            self.line.nodes.append(node)
        return node

    def _forget(self, endpoint: Endpoint, node: Node) -> None:
        del self._nodes[endpoint]
        self.line.nodes.remove(node)
        node.close()
        if node.breaker.is_open:
            away = node.breaker.close(self.line.loop.time())
            logger.info("store_available", store=node.name, away_seconds=round(away, 3), replaced=True)
            self.line.restored()

    def _key_of(self, node: Node) -> bytes:
        for number in range(SLOTS if node in self._owners else 0):
            key = b"sigil:probe:%d" % number
            if self._owners[slot_of(key)] is node:
                return key
        return b"sigil:probe"

    # What nodes say.

    def failing(self, node: Node) -> None:
        self.refresh()

    def elsewhere(self, run: Run, node: Node) -> None:
        if self.refresh():
            run.gate = self
            self.waiting.append(run)
        else:
            # The map has just been read, and says that it is this one: on a new connection, if that is taken for well.
            node.again(run)

    def redirected(self, run: Run, node: Node, ask: bool, target: str) -> bool:
        slot, _, place = target.partition(" ")
        host, _, port = place.rpartition(":")
        if host == "?" or not (slot.isdigit() and int(slot) < SLOTS and port.isdigit()):
            return False
        other = self._node(Endpoint(host or node.connected_to.host, int(port)))
        if ask:
            other.ask_once(run)
        else:
            self._owners[int(slot)] = other
            self.refresh()
            other.again(run)
        return True
