"""The machine that kernels run on: caches and cores, found once; what a schedule is derived from.

What the system tells is completed by the file that ``fastnorm tune`` wrote (`machine_file`), where
it is of this machine. ``FASTNORM_MACHINE`` takes the place of that file, and of what the system
tells, all of it or single facts, separated by commas: the name of a model (`MODELS`), a file of
``name = value`` lines, or ``l2=2M``; ``system`` is what the system tells alone. A model says what
caches there are; the cores of this process stay its own, unless ``cores=4`` is written.

The instruction set is found once by the compiled kernels (`_core`); ``FASTNORM_CPU`` caps it.
"""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fastnorm import limits, machine_file, processor

CACHES = Path("sys/devices/system/cpu/cpu0/cache")

# Where the system tells of no cache that cores share (containers, AArch64 in clouds). There is one
# on every machine with 1 MB of L2 that we know, and results that it would have held are read from
# it.
LAST_CACHE_BYTES = 32 << 20
# A larger one than this lies about a whole socket. How much of it others leave to this process is
# not told, and it is slower than its size suggests: it counts as LAST_CACHE_BYTES.
MAX_LAST_CACHE_BYTES = 128 << 20


@dataclass(frozen=True, slots=True, eq=False)  # each is itself: schedules are kept by it
class Machine:
    """Bytes of its caches (0: not told), the cores that share the last one, and those of ours."""

    l1: int = 0
    l2: int = 0
    l3: int = 0
    l3_cores: int = 1
    cores: int = 1
    always_non_temporal: bool = False  # for tests: whatever the sizes of arrays
    # Bytes of x, as measured (`fastnorm tune`); 0: as schedule.py has it. From so many on
    # non-temporal stores pay, of contiguous and of strided walks; a second thread helps; and it is
    # worth waking one that sleeps.
    non_temporal_bytes: int = 0
    non_temporal_strided_bytes: int = 0
    non_temporal_backward_bytes: int = 0
    non_temporal_backward_strided_bytes: int = 0
    serial_bytes: int = 0
    serial_backward_bytes: int = 0
    wake_bytes: int = 0
    last_cache: int = field(init=False)  # bytes of what all arrays of a call go through

    def __post_init__(self) -> None:
        told = self.l3 if self.l3 <= MAX_LAST_CACHE_BYTES else 0
        last = 0 if self.always_non_temporal else told or LAST_CACHE_BYTES
        object.__setattr__(self, "last_cache", last)

    @property
    def caches(self) -> dict[str, int]:
        """Bytes of one cache of each level that is told."""
        sizes = {"L1": self.l1, "L2": self.l2, "L3": self.l3}
        return {level: size for level, size in sizes.items() if size}

    @property
    def measured(self) -> dict[str, int]:
        """What was measured of it, by name."""
        return {name: n for name in MEASURED if (n := getattr(self, name))}

    def with_measured(self, facts: dict[str, int]) -> Machine:
        """The same with other facts of those that are measured."""
        found: Machine = replace(self, **facts)  # type: ignore[arg-type]
        return found

    @property
    def near_cache(self) -> int:
        """Bytes that one core finds again: its L2 and its share of the last cache."""
        return self.l2 + self.last_cache // max(self.l3_cores, 1)


MEASURED = tuple(fact.name for fact in fields(Machine) if fact.name.endswith("_bytes"))
# What tells this machine from others, with its processor's name.
TOLD = ("l1", "l2", "l3", "l3_cores")

# What decisions are tested on, besides the machine at hand; sizes as their systems tell them.
MODELS = {
    "zen5": Machine(l1=48 << 10, l2=1 << 20, l3=32 << 20, l3_cores=8, cores=8),
    "sapphire-rapids": Machine(l1=48 << 10, l2=2 << 20, l3=480 << 20, l3_cores=60, cores=2),
    "laptop": Machine(l1=48 << 10, l2=1280 << 10, l3=12 << 20, l3_cores=8, cores=8),
    "avx2-server": Machine(l1=32 << 10, l2=512 << 10, l3=16 << 20, l3_cores=4, cores=16),
    "aarch64-cloud": Machine(l1=64 << 10, l2=1 << 20, cores=4),
}

# Of `fastnorm tune`: no facts of a machine.
_OF_FILES = ("format", "processor", "date")

_FACTS = {fact.name: fact.type for fact in fields(Machine) if fact.init}


def number_of_bytes(text: str) -> int | None:
    """The number that "32M", "512K" or "4096" stand for; None for anything else."""
    text = text.strip()
    shift = {"K": 10, "M": 20, "G": 30}.get(text[-1:].upper(), 0)
    n = limits.whole_number(text[:-1] if shift else text)
    return None if n is None else n << shift


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:  # some containers show only parts of it
        return ""


def _count(cpus: str) -> int:
    """How many processors a list such as "0-3,8" has."""
    n = 0
    for part in cpus.split(","):
        first, _, last = part.partition("-")
        low, high = limits.whole_number(first), limits.whole_number(last or first)
        n += 0 if low is None or high is None else high - low + 1
    return max(n, 1)


def found(root: Path = limits.ROOT) -> Machine:
    """The machine as its system tells it; tests have files of their own."""
    caches, shared_by = {1: 0, 2: 0, 3: 0}, 1
    for folder in (root / CACHES).glob("index*"):
        level = limits.whole_number(_read(folder / "level"))
        size = number_of_bytes(_read(folder / "size"))
        if level not in caches or not size or _read(folder / "type") == "Instruction":
            continue
        caches[level] = size
        if level == 3:
            shared_by = _count(_read(folder / "shared_cpu_list"))
    return Machine(caches[1], caches[2], caches[3], shared_by, limits.processors(root))


def of_text(text: str, machine: Machine) -> Machine:
    """`machine` with what a text says in the manner of ``FASTNORM_MACHINE``."""
    for part in filter(None, (part.strip() for part in text.split(","))):
        if part == "system":
            continue
        if "=" in part:
            machine = _with_fact(machine, part)
        elif part in MODELS:
            machine = replace(MODELS[part], cores=machine.cores)
        elif (text_of_file := _text_of(part)) is not None:
            for line in text_of_file.splitlines():
                fact = line.partition("#")[0].strip()
                if fact.partition("=")[0].strip() not in ("", *_OF_FILES):
                    machine = _with_fact(machine, fact)
        else:
            raise ValueError(
                f"FASTNORM_MACHINE has {part!r:.80}, which is no model, no file and no fact; write "
                f"one of {', '.join(MODELS)}, the path of a file, or a fact such as l2=2M"
            )
    return machine


def _text_of(name: str) -> str | None:
    try:
        text = machine_file.text_of(Path(name))
    except machine_file.Unusable as error:
        raise ValueError(
            f"FASTNORM_MACHINE has {name!r:.80}, and {error}; write the path of a file of at most "
            f"{machine_file.MAX_BYTES} bytes with lines such as l2=2M"
        ) from None
    return None if text is None else text.decode("ascii", errors="replace")


def _with_fact(machine: Machine, text: str) -> Machine:
    name, _, value = (word.strip() for word in text.partition("="))
    n = number_of_bytes(value)
    if name not in _FACTS or n is None or (n == 0 and name.endswith("cores")):
        raise ValueError(
            f"FASTNORM_MACHINE has {text!r:.80}, expected one of {', '.join(_FACTS)} and a number, "
            "such as l2=2M or cores=4"
        )
    value_of: Any = bool(n) if _FACTS[name] == "bool" else n
    return replace(machine, **{name: value_of})


# --- What fastnorm tune wrote ---------------------------------------------------------------------


def identity(machine: Machine) -> dict[str, object]:
    """What a file must say to be of this machine."""
    return {"processor": processor.name()} | {name: getattr(machine, name) for name in TOLD}


def tuned(machine: Machine, file: Path) -> Machine | None:
    """`machine` with what a file says was measured; None without it, or `machine_file.Unusable`."""
    facts = machine_file.read(file)
    if facts is None:
        return None
    if any(facts.pop(name, "") != str(value) for name, value in identity(machine).items()):
        raise machine_file.Unusable("it is of another machine")
    facts.pop("date", "")
    numbers = {name: limits.whole_number(text) or 0 for name, text in facts.items()}
    for name, n in numbers.items():
        if name not in MEASURED or not 0 < n < 1 << 48:
            raise machine_file.Unusable(f"it is damaged: {name:.40} = {facts[name]!a:.40}")
    return machine.with_measured(numbers)


@dataclass(frozen=True, slots=True)
class Source:
    """Where the facts of the machine at hand are from."""

    text: str
    passed_over: str = ""  # a file of `fastnorm tune` that is not used, and why
    named: bool = False  # by FASTNORM_MACHINE


def at_hand() -> tuple[Machine, Source]:
    """The machine of this process; a file that cannot be used is named in a warning."""
    text, system = os.environ.get("FASTNORM_MACHINE", ""), found()
    if text.strip():
        return of_text(text, system), Source(f"FASTNORM_MACHINE={text}", named=True)
    file = machine_file.path()
    if file is None:
        return system, Source("the system")
    try:
        machine = tuned(system, file)
    except machine_file.Unusable as error:
        why = f"{machine_file.shown(file)} is not used: {error}"
        what = "fastnorm tune measures this machine anew, fastnorm tune --forget removes the file"
        with suppress(Warning):  # an import does not fail for it where warnings are errors
            warnings.warn(f"{why}; {what}", RuntimeWarning, stacklevel=2)
        return system, Source("the system", why)
    if machine is None:
        return system, Source("the system")
    wrote = f"the system and {machine_file.shown(file)}, which fastnorm tune wrote"
    return machine, Source(wrote)


# The machine at hand.
here, source = at_hand()


def exchange(machine: Machine) -> Machine:
    """Make another machine the one at hand; returns the one before (`runtime.on_machine`)."""
    global here
    before, here = here, machine
    return before
