"""The public face: names, what importing costs, and that the README says what is true."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr

import sigil_policy
from sigil_policy import registered_types

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def in_a_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("name", sigil_policy.__all__)
def test_every_public_name_is_there_and_says_what_it_is(name: str) -> None:
    value = getattr(sigil_policy, name)
    documented = inspect.getdoc(value)
    assert documented
    assert not documented.startswith(f"{name}("), "a dataclass's signature is no docstring"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        sigil_policy.Nothing  # noqa: B018


def test_importing_the_package_imports_nothing_that_is_not_used() -> None:
    loaded = json.loads(in_a_new_process("import sys, json, sigil_policy; print(json.dumps(sorted(sys.modules)))"))
    heavy = ("pydantic", "starlette", "structlog", "limits", "jwt", "cryptography", "fastapi", "redis", "httpx2")
    assert not [name for name in loaded if name.partition(".")[0] in heavy]


def test_all_policies_together_import_no_extra() -> None:
    loaded = json.loads(
        in_a_new_process("import sys, json; from sigil_policy import *; print(json.dumps(sorted(sys.modules)))")
    )
    extras = ("fastapi", "redis", "httpx2", "uvicorn", "xxhash", "sentry_sdk")
    assert not [name for name in loaded if name.partition(".")[0] in extras]


def test_the_readme_shows_the_codes_that_the_library_owns() -> None:
    in_a_new_process("import sigil_policy")
    shown = set(re.findall(r"^\| `([A-Z_]+_\d{3})` \| (\d{3}) \| (\w+) \|$", README, re.MULTILINE))
    owned = ("AUTH", "RATE", "CTX", "API")
    declared = {
        (kind.code, str(kind.status), kind.title)
        for kind in registered_types()
        if kind.code.partition("_")[0] in owned or kind.code in ("REQ_001", "REQ_002", "REQ_003")
    }
    assert shown == declared


def test_the_readme_shows_the_quickstart_as_it_is() -> None:
    quickstart = (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8")
    code = quickstart[quickstart.index("import os\n") :]
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert code.strip() in [block.strip() for block in blocks]


def test_the_readmes_python_runs() -> None:
    """One after the other, as somebody who pastes them; what their functions do is not called."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    in_a_new_process(f"import os; os.environ['SECRET'] = 's' * 32\n{code}")


def test_the_readme_names_every_policy() -> None:
    policies = {
        name
        for name in sigil_policy.__all__
        if inspect.isclass(getattr(sigil_policy, name)) and f"{name}Middleware" in sigil_policy.__all__
    }
    assert policies == set(re.findall(r"^\| `(\w+)` \| ", README, re.MULTILINE)) & policies
    assert len(policies) == 21


def test_the_readmes_order_of_policies_is_one_that_works() -> None:
    key = sigil_policy.Key(algorithm="HS256", secret=SecretStr("s" * 32))
    tickets = sigil_policy.MemoryTickets()
    options: dict[str, dict[str, object]] = {
        "AllowedOrigins": {"origins": []},
        "ApiKeyAuth": {"store": sigil_policy.MemoryApiKeyStore(()), "pepper": SecretStr("p" * 32)},
        "BearerAuth": {"issuers": [sigil_policy.Issuer(url="https://auth.example.com", audience="a", keys=[key])]},
        "ConcurrencyLimit": {"limits": 5},
        "ProtectedResourceMetadata": {
            "documents": [sigil_policy.ProtectedResource(resource="https://api.example.com/mcp")]
        },
        "Revocation": {"store": sigil_policy.MemoryRevocations()},
        "WebSocketTicketAuth": {"store": tickets},
        "WebSocketTickets": {"store": tickets},
        "Versioning": {"versions": {"v7": sigil_policy.Version(phase="current")}},
    }
    names = re.findall(r"^\| `([A-Z][A-Za-z]+)` \| ", README.split("## One pass")[0], re.MULTILINE)
    assert len(names) == 21
    policies = [getattr(sigil_policy, name)(**options.get(name, {})) for name in names]
    stack = sigil_policy.PolicyStack(lambda scope, receive, send: None, policies=policies)
    assert not stack.missing


def test_project_files_name_no_machine() -> None:
    wrong = re.compile(r"/work/|/tmp/venv|file:///|pypi\.internal")
    for pattern in ("**/*.py", "*.md", "*.toml", ".ci/*"):
        for path in ROOT.glob(pattern):
            if not {".venv", "build"} & set(path.parts) and path != Path(__file__):
                assert not wrong.search(path.read_text(encoding="utf-8")), path
