"""Check every peer, on cases cut down to 8 elements an axis: `python -m benchmarks.peers`."""

from __future__ import annotations

import argparse
import sys

from fastnorm._bench.cases import data
from fastnorm._bench.peers import PEERS, Absent, checked, reference

from .cases import CASES


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(PEERS)}; default: all")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only each Nth case")
    options = parser.parse_args()
    wrong = 0
    for case in list(dict.fromkeys(case.cut(8) for case in CASES))[:: options.every]:
        arrays = data(case)
        exact = reference(case, arrays)
        for name in options.names or PEERS:
            try:
                checked(name, case, arrays, exact)
            except Absent as reason:
                # what a peer does not have is no mistake, unlike an answer or an error of its own
                wrong += reason.__cause__ is not None
                print(f"{case}: {name}: {reason}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
