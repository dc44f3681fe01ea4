"""What pyproject.toml asks for, one requirement a line: requirements.py [--oldest] [EXTRA...].

The extras of this project that an extra names are replaced by what is in them, so that pip never
looks for fastnorm-kernels anywhere. With --oldest each requirement is pinned to its lower bound;
what is pinned anyway, a peer that tests compare with, is left out. `build-system` counts as an
extra.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
# A name, extras of it, the lower bound or the pin, and a marker.
REQUIREMENT = re.compile(
    r"(?P<name>[\w.-]+)(?:\[(?P<extras>[\w,-]+)\])?"
    r"(?:(?P<relation>>=|==)(?P<version>[\w.]+))?(?P<marker>\s*;.*)?"
)


def parts(requirement: str) -> re.Match[str]:
    """The named groups of `REQUIREMENT` in one requirement."""
    found = REQUIREMENT.fullmatch(requirement)
    if found is None:
        raise ValueError(f"{requirement!r} in pyproject.toml is not of the form name[extra]>=1.2")
    return found


def requirements(*extras: str) -> list[str]:
    """What the package needs, and what each of the extras adds, without this project's own name."""
    content = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))
    project = content["project"]
    groups = project["optional-dependencies"] | {
        "build-system": content["build-system"]["requires"]
    }
    found: list[str] = []
    waiting = [*project["dependencies"]]
    waiting += [line for extra in extras for line in groups[extra]]
    while waiting:
        line = waiting.pop(0)
        if parts(line)["name"] == project["name"]:
            waiting += [
                other for extra in parts(line)["extras"].split(",") for other in groups[extra]
            ]
        elif line not in found:
            found.append(line)
    return found


def oldest(requirement: str) -> str | None:
    """The requirement at its lower bound; None where it is pinned."""
    found = parts(requirement)
    if found["relation"] == "==":
        return None
    if found["relation"] is None:
        raise ValueError(f"{requirement!r} in pyproject.toml has no lower bound")
    extras = f"[{found['extras']}]" if found["extras"] else ""
    return f"{found['name']}{extras}=={found['version']}{found['marker'] or ''}"


if __name__ == "__main__":
    wanted = sys.argv[1:]
    lines = requirements(*(name for name in wanted if name != "--oldest"))
    if "--oldest" in wanted:
        lines = [line for line in map(oldest, lines) if line is not None]
    print("\n".join(lines))
