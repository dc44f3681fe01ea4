"""Check what would be published: two builds in two places give equal bytes, and are as they should.

The files stay in dist/.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAME = "fastnorm_kernels"
MOMENT = 1767225600  # 2026-01-01: any fixed one, which files in the archives then carry
ENVIRONMENT = {"SOURCE_DATE_EPOCH": str(MOMENT), "FASTNORM_BUILD_KERNELS": "1"}
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv*", "*.so", "*.pyd", "__pycache__", ".*_cache", ".hypothesis", "build", "dist"
)


def python(*arguments: str, **options: object) -> None:
    """Run this Python; an error of it ends the check."""
    print("$ python", *arguments, flush=True)
    subprocess.run([sys.executable, *arguments], check=True, **options)  # type: ignore[call-overload]


def settled(content: bytes) -> bytes:
    """A source distribution without the times, owners and umask of its build."""
    packed = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(content)) as old,
        gzip.GzipFile("", "wb", fileobj=packed, mtime=MOMENT) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in sorted(old.getmembers(), key=lambda member: member.name):
            entry = tarfile.TarInfo(member.name)
            entry.type, entry.size, entry.mtime = member.type, member.size, MOMENT
            entry.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            new.addfile(entry, old.extractfile(member) if member.isfile() else None)
    return packed.getvalue()


def build(tree: Path) -> dict[str, bytes]:
    """A source distribution and a wheel from it, built in that tree: name to bytes."""
    python("-m", "build", "--no-isolation", cwd=tree, env=os.environ | ENVIRONMENT)
    built = {path.name: path.read_bytes() for path in (tree / "dist").iterdir()}
    return {name: settled(b) if name.endswith(".gz") else b for name, b in built.items()}


def main() -> int:
    """Build twice, compare, check; 1 where the builds differ."""
    with tempfile.TemporaryDirectory() as folder:
        # of different depths, and names of different lengths
        trees = Path(folder, "a"), Path(folder, "another/place")
        for tree in trees:
            shutil.copytree(ROOT, tree, ignore=NOT_COPIED)
        first, second = map(build, trees)
    differing = {name for name in first | second if first.get(name) != second.get(name)}
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    dist.mkdir()
    for name, content in first.items():
        (dist / name).write_bytes(content)
        print(hashlib.sha256(content).hexdigest(), name)
    if differing:
        print(f"two builds differ: {', '.join(sorted(differing))}", file=sys.stderr)
        return 1
    files = [str(dist / name) for name in sorted(first)]
    python("-m", "twine", "check", "--strict", *files)
    python("-m", "check_wheel_contents", "--toplevel", "fastnorm", str(dist))
    # That pip takes them for what docs and messages name.
    python(
        "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed", "--no-index",
        "--find-links", str(dist), "fastnorm-kernels[stats]",
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
