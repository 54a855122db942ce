"""The fifteen lines work, and they are fifteen."""

import ast
import importlib
import re
import subprocess
import sys
import time
from pathlib import Path

import jwt
import pytest
from starlette.testclient import TestClient

SECRET = "0123456789abcdef0123456789abcdef"
FILE = Path(__file__).resolve().parents[2] / "examples" / "quickstart.py"


@pytest.fixture
def client(monkeypatch):
    monkeypatch.setenv("SECRET", SECRET)
    sys.modules.pop("examples.quickstart", None)
    yield TestClient(importlib.import_module("examples.quickstart").app)
    del sys.modules["examples.quickstart"]


def test_it_is_fifteen_lines():
    tree = ast.parse(FILE.read_text())
    first = tree.body[1].lineno  # after the docstring
    code = [line for line in FILE.read_text().splitlines()[first - 1 :] if line.strip()]
    assert len(code) == 15


def test_strangers_are_refused_and_told_how_to_do_better(client):
    response = client.get("/hello")
    assert response.status_code == 401
    assert response.headers["www-authenticate"].startswith("Bearer")
    assert response.json()["request_id"] == response.headers["x-request-id"]


def test_the_token_of_the_docstring_is_accepted(client):
    shell = ast.get_docstring(ast.parse(FILE.read_text()))
    program = re.search(r'TOKEN=\$\(python -c "(.*?)"\)', shell, re.DOTALL)[1]
    token = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    response = client.get("/hello", headers={"Authorization": f"Bearer {token}"})
    assert (response.status_code, response.json()) == (200, {"hello": "ada"})
    for name in ("x-request-id", "x-ratelimit-remaining", "etag", "cache-control"):
        assert name in response.headers


def test_without_the_scope_it_is_forbidden(client):
    claims = {"iss": "https://auth.example.com", "aud": "hello", "sub": "ada", "exp": int(time.time()) + 60}
    token = jwt.encode(claims, SECRET, "HS256")
    response = client.get("/hello", headers={"Authorization": f"Bearer {token}"})
    assert (response.status_code, response.json()["error_code"]) == (403, "AUTH_004")
