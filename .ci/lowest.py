"""Print the core dependencies pinned to the lowest versions that pyproject.toml allows."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
print(*(re.sub(r">=(\S+)", r"==\1.*", requirement) for requirement in project["dependencies"]))
