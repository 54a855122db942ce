"""The commands, as a newcomer types them: processes of their own, a real socket, the same home."""

import json
import re
import shlex
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import jwt
import pytest

from examples.sigil_api import commands
from examples.sigil_api.home import AUDIENCE, DEFAULT_HOME, ISSUER, Home
from examples.sigil_api.tour import Server, tour

CHECKOUT = Path(__file__).resolve().parents[2]


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "examples.sigil_api", *map(str, arguments)],
        cwd=CHECKOUT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return Home(tmp_path_factory.mktemp("commands") / "home")


@pytest.fixture(scope="module")
def server(home):
    started = Server(home)
    with httpx2.Client(base_url=started.url(), trust_env=False, timeout=60) as client:
        started.client = client
        yield started
    started.stop()


def bearer(token):
    return {"Authorization": f"Bearer {token}"}


def test_a_token_of_the_command_is_accepted_by_a_server_of_the_same_home(server, home):
    made = command("token", "--subject", "ada", "--tier", "free", "--scope", "agents:read", "--home", home.folder)
    assert made.returncode == 0, made.stderr
    token = made.stdout.splitlines()[-1]
    assert server.client.get("/v7/budget/status", headers=bearer(token)).json()["tier"] == "free"
    claims = jwt.decode(token, options={"verify_signature": False})
    assert (claims["sub"], claims["tier"], claims["scope"]) == ("ada", "free", "agents:read")
    assert (claims["iss"], claims["aud"]) == (ISSUER, AUDIENCE)


def test_a_running_server_notices_a_new_key_within_a_second(server, home):
    made = command("key", "--subject", "reports", "--tier", "pro", "--scope", "agents:read", "--home", home.folder)
    assert made.returncode == 0, made.stderr
    key = made.stdout.splitlines()[-1]
    headers = {"X-API-Key": key}
    # Asking before the second is over must not be remembered against the key.
    server.client.get("/v7/agents", headers=headers)
    time.sleep(1)
    assert server.client.get("/v7/agents", headers=headers).status_code == 200
    assert server.client.post("/v7/agents", headers=headers, json={}).status_code == 403
    assert key not in home.keys_file.read_text()


def test_an_unknown_key_is_refused(server, tmp_path):
    key = Home(tmp_path / "other").issue_key(subject="eve", tier="pro", scopes=["agents:read"])
    assert server.client.get("/v7/agents", headers={"X-API-Key": key}).status_code == 401


def test_the_lines_to_paste_work_in_the_order_in_which_they_stand(server):
    statuses = []
    for line in server.lines:
        if line.startswith("curl "):
            _, option, url, *rest = shlex.split(line)
            given = list(zip(rest[::2], rest[1::2], strict=True))
            headers = dict(value.split(": ") for flag, value in given if flag == "-H")
            body = dict(given).get("-d")
            assert option in ("-i", "-N")
            response = server.client.request("POST" if body else "GET", url, headers=headers, content=body)
            statuses.append(response.status_code)
    assert statuses == [200, 201, 200, 200, 200, 200, 200]


def test_one_line_per_exchange_as_soon_as_it_ended(server):
    assert server.client.get("/health", headers={"X-Request-ID": "line-1"}).headers["x-request-id"] == "line-1"
    found, deadline = [], time.monotonic() + 30
    while not found and time.monotonic() < deadline:
        time.sleep(0.02)
        found = [event for event in server.log() if event["request_id"] == "line-1"]
    assert [(event["status"], event["method"]) for event in found] == [(200, "GET")]
    after_greeting = server.lines[server.lines.index("One JSON line per exchange:") + 1 :]
    assert all(line.startswith("{") for line in after_greeting)


def test_other_events_are_json_on_standard_error(home):
    started = subprocess.Popen(
        [sys.executable, "-m", "examples.sigil_api", "serve", "--port", "0", "--home", str(home.folder)],
        cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    greeting = []
    while not greeting or not greeting[-1].startswith("One JSON line"):
        greeting.append(started.stdout.readline())
    url = greeting[0].split()[5]
    token = home.mint_token(subject="gus", tier="gold", scopes=["agents:read"])
    status = httpx2.get(f"{url}/v7/agents", headers=bearer(token), trust_env=False, timeout=60).status_code
    started.terminate()
    exchanges, others = (output.splitlines() for output in started.communicate(timeout=60))
    assert (status, [json.loads(line)["tier"] for line in exchanges]) == (200, ["free"])
    assert [json.loads(line)["event"] for line in others] == ["rate_limit_tier_unknown"]


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is no signal there")
def test_ctrl_c_ends_the_server_quietly(home):
    started = subprocess.Popen(
        [sys.executable, "-m", "examples.sigil_api", "serve", "--port", "0", "--home", str(home.folder)],
        cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while started.stdout.readline() != "One JSON line per exchange:\n":
        assert started.poll() is None
    started.send_signal(signal.SIGINT)
    _, complaints = started.communicate(timeout=60)
    assert (started.returncode, complaints) == (0, "")


def test_a_stream_arrives_token_by_token(server, home):
    headers = bearer(home.mint_token(subject="sam", tier="pro", scopes=["agents:write", "agents:execute"]))
    server.client.post(
        "/v7/agents", headers=headers, json={"name": "streamer", "stratum": "RAI", "description": "Streams"}
    )
    body = {"input": "Tell me a long story about streams", "stream": True}
    lasted = []
    # Who is held up after the first line finds all the others waiting, once or twice.
    while not lasted or (max(lasted) <= 0.1 and len(lasted) < 5):
        with server.client.stream("POST", "/v7/agents/streamer/run", headers=headers, json=body) as response:
            arrivals = [time.monotonic() for _ in response.iter_lines()]
        lasted.append(arrivals[-1] - arrivals[0])
    assert max(lasted) > 0.1


def test_a_client_that_leaves_is_charged_for_what_was_produced(server, home):
    headers = bearer(home.mint_token(subject="lea", tier="pro", scopes=["agents:write", "agents:execute"]))
    server.client.post("/v7/agents", headers=headers, json={"name": "leaver", "stratum": "RAI", "description": "Left"})
    body = {"input": "word " * 100, "stream": True, "config": {"max_tokens": 4000}}
    minute = None
    while minute != time.time() // 60:  # budgets begin anew with the minute: it has to be the same one at the end
        minute = time.time() // 60
        with server.client.stream("POST", "/v7/agents/leaver/run", headers=headers, json=body) as response:
            next(response.iter_lines())
        deadline = time.monotonic() + 20
        used = 500
        while used >= 500 and time.monotonic() < deadline:  # the estimate is held until the end is noticed
            time.sleep(0.05)
            used = server.client.get("/v7/budget/status", headers=headers).json()["tokens"][0]["used"]
    assert 100 < used < 500


def test_the_home_is_its_owners_alone(server, home):
    assert stat.S_IMODE(home.folder.stat().st_mode) == 0o700
    home.issue_key(subject="reports", tier="pro", scopes=[])
    files = list(home.folder.iterdir())
    assert {file.name for file in files} == {"signing_secret", "pepper", "api_keys.jsonl"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_commands_that_start_together_get_the_same_secret(tmp_path):
    found, start = [], threading.Barrier(8)

    def ask():
        start.wait()
        found.append(Home(tmp_path / "home").signing_secret().get_secret_value())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert len(found[0]) == 64
    assert [file.name for file in (tmp_path / "home").iterdir()] == ["signing_secret"]


def test_the_default_home_is_in_the_checkout_and_ignored_by_git():
    assert DEFAULT_HOME == CHECKOUT / ".sigil_api"
    assert ".sigil_api/" in (CHECKOUT / ".gitignore").read_text().split()


def test_a_database_file_survives_the_server(home, tmp_path):
    database = tmp_path / "agents.db"
    token = home.mint_token(subject="dora", tier="pro", scopes=["agents:read", "agents:write"])
    for status in (201, 409):
        started = Server(home, "--db", str(database))
        try:
            with httpx2.Client(base_url=started.url(), trust_env=False, timeout=60) as client:
                body = {"name": "lasting", "stratum": "RAI", "description": "Lasts"}
                assert client.post("/v7/agents", headers=bearer(token), json=body).status_code == status
        finally:
            started.stop()


def test_a_port_that_is_taken_is_an_error_that_says_so(server, home):
    port = server.url().rpartition(":")[2]
    taken = command("serve", "--port", port, "--home", home.folder)
    assert taken.returncode != 0
    assert "in use" in taken.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], id="no command"),
        pytest.param(["fly"], id="unknown command"),
        pytest.param(["token", "--scope", 'agents:"read"'], id="no scope"),
        pytest.param(["token", "--subject", ""], id="nobody"),
        pytest.param(["serve", "--port", "high"], id="no port"),
    ],
)
def test_wrong_arguments_are_told(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        commands.main(arguments)
    assert stopped.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_a_token_is_alone_on_its_line(tmp_path, capsys):
    assert commands.main(["token", "--home", str(tmp_path)]) == 0
    assert re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+\n", capsys.readouterr().out)


def test_the_tour_finds_everything_in_order():
    walked = command("tour")
    shown = walked.stdout
    assert walked.returncode == 0, shown
    for seen in ("401 Unauth", "403 Forbidden", "404 Not Found", "409 Conflict", "304 Not Modified", "429 Too Many"):
        assert f"-> {seen}" in shown
    assert int(re.findall(r"^ ?(\d+)\. ", shown, re.MULTILINE)[-1]) >= 20


def test_the_tour_fails_when_something_is_off(capsys, monkeypatch):
    monkeypatch.setattr(
        "examples.sigil_api.tour._walk", lambda guide, _: guide.check("the moon is cheese", False) or []
    )
    assert tour() == 1
    assert "the moon is cheese" in capsys.readouterr().out
