"""Several workers of the service on one store: their limits are one."""

import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from examples.sigil_api.commands import main
from examples.sigil_api.home import Home
from examples.sigil_api.tour import Server


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return Home(tmp_path_factory.mktemp("workers") / "home")


@pytest.fixture(scope="module")
def server(home):
    started = Server(home, "--workers", "2", "--store", "embedded")
    url = started.url()
    # Workers take a moment to import what they serve.
    end = time.monotonic() + 60
    while True:
        try:
            httpx2.get(f"{url}/health", trust_env=False, timeout=60)
            break
        except httpx2.TransportError:
            assert time.monotonic() < end
            time.sleep(0.1)
    started.address = url
    yield started
    started.stop()


def ask(server, headers):
    return httpx2.get(f"{server.address}/v7/agents", headers=headers, trust_env=False, timeout=60)


def test_two_workers_admit_together_what_one_would(server, home):
    for attempt in range(3):
        token = home.mint_token(subject=f"ada-{attempt}", tier="free", scopes=["agents:read"])
        headers = {"Authorization": f"Bearer {token}"}
        begun = int(time.time())
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _, headers=headers: ask(server, headers), range(40)))
        seconds = int(time.time()) - begun + 1
        admitted = [answer for answer in answers if answer.status_code == 200]
        if len(admitted) <= seconds:
            break
        # On a machine that stands still the store is away for a moment, and each worker admits its share: once more.
        time.sleep(2)
    assert {answer.status_code for answer in answers} <= {200, 429}
    # One in a second, and twenty in a minute, whichever of the two was asked.
    assert 1 <= len(admitted) <= min(seconds, 40)
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.json()["error_code"] == "RATE_001"
    assert refused.headers["retry-after"] == "1"


def test_what_a_run_used_is_known_to_every_worker(server, home):
    scopes = ["agents:write", "agents:execute", "agents:read"]
    for attempt in range(3):
        token = home.mint_token(subject=f"grace-{attempt}", tier="pro", scopes=scopes)
        headers = {"Authorization": f"Bearer {token}"}
        agent = {"name": f"counter_{attempt}", "stratum": "RAI", "description": "Counts"}
        url = f"{server.address}/v7/agents"
        made = httpx2.post(url, json=agent, headers=headers, trust_env=False, timeout=60)
        assert made.status_code == 201
        url = f"{url}/{agent['name']}/run"
        run = httpx2.post(url, json={"input": "count"}, headers=headers, trust_env=False, timeout=60)
        left = 500_000 - run.json()["metadata"]["tokens_used"]["total_tokens"]
        answers = [ask(server, headers) for _ in range(6)]
        budgets = {answer.headers["ratelimit"].split('"tokens-minute";r=')[1].split(";")[0] for answer in answers}
        if run.headers["x-tokens-remaining"] == str(left) and budgets == {str(left)}:
            break
        # A new minute has begun, or the store was away for a moment (as above): once more.
        time.sleep(2)
    assert run.headers["x-tokens-remaining"] == str(left)
    assert budgets == {str(left)}


@pytest.mark.parametrize("workers", ["0", "many", "65"])
def test_a_wrong_number_of_workers_is_said(workers, capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--workers", workers])
    assert "1 to 64" in capsys.readouterr().err


def descendants(process):
    """The process ids below `process`."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = dict(map(int, line.split()) for line in listed.splitlines())
    found = {process}
    for _ in range(4):
        found |= {pid for pid, parent in parents.items() if parent in found}
    return found - {process}


def test_ending_the_service_ends_its_workers_and_its_store(home):
    started = Server(home, "--workers", "2", "--store", "embedded")
    started.url()
    process = started._process.pid
    # Two workers, the resource tracker of multiprocessing, and Valkey.
    end = time.monotonic() + 60
    while len(below := descendants(process)) < 4:
        assert time.monotonic() < end
        time.sleep(0.1)
    started.stop()
    end = time.monotonic() + 60
    while running() & below:
        assert time.monotonic() < end
        time.sleep(0.1)


def running():
    listed = subprocess.run(["ps", "-A", "-o", "pid=,stat="], capture_output=True, text=True, check=True).stdout
    return {int(pid) for pid, state in map(str.split, listed.splitlines()) if not state.startswith("Z")}
