"""The one table of what is timed: operations, and the shapes they are called on.

`make bench` times CASES, OUT and THREADS, and the peers, the gate times GATE, and
tests/test_benchmarks.py checks every peer's result on shrunken copies of them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from fastnorm._bench.cases import Case

_layer = partial(Case, "layer_norm (normalized_shape)")
_rms = partial(Case, "rms_norm")
_group = partial(Case, "group_norm", num_groups=32)
_instance = partial(Case, "instance_norm")
_training = partial(Case, "batch_norm (training)")
_inference = partial(Case, "batch_norm (inference)")
_add_layer = partial(Case, "add_layer_norm")
_add_rms = partial(Case, "add_rms_norm")

_LAYER_SHAPES = ((1, 64), (8, 768), (64, 768), (4096, 768), (4096, 1024), (8192, 4096))
_RMS_SHAPES = ((8, 768), (4096, 768), (8192, 4096))
_GROUP_SHAPES = ((2, 64, 8, 8), (8, 256, 32, 32), (2, 320, 64, 64), (2, 256, 128, 128))
_INSTANCE_SHAPES = ((8, 64, 64, 64), (4, 64, 256, 256), (1, 16, 128, 128, 128))
_BATCH_SHAPES = ((32, 64, 56, 56), (64, 512, 8, 8), (32, 256, 28, 28))
_LAYOUTS = (False, True)

_FORWARD = (
    *(_layer(shape) for shape in _LAYER_SHAPES),
    *(_rms(shape) for shape in _RMS_SHAPES),
    *(_group(shape, channels_last=last) for shape in _GROUP_SHAPES for last in _LAYOUTS),
    *(_instance(shape) for shape in _INSTANCE_SHAPES),
    *(_training(shape, channels_last=last) for shape in _BATCH_SHAPES for last in _LAYOUTS),
    *(_inference(shape, channels_last=last) for shape in _BATCH_SHAPES for last in _LAYOUTS),
    _layer((4096, 768), dtype="bfloat16"),
    _rms((4096, 768), dtype="bfloat16"),
    _group((8, 256, 32, 32), dtype="bfloat16"),
    _layer((4096, 768), dtype="float64"),
    _group((8, 256, 32, 32), dtype="float64"),
    _training((64, 512, 8, 8), dtype="float64"),
)

_BACKWARD = tuple(
    replace(case, backward=True) for case in _FORWARD if case.label != "batch_norm (inference)"
)

_FUSED = (
    _group((8, 256, 32, 32), activation="silu"),
    _group((2, 320, 64, 64), activation="silu"),
    _add_rms((8, 768)),
    _add_rms((4096, 768)),
    _add_rms((2048, 4096)),
    _add_layer((4096, 768)),
    *(
        _inference(shape, channels_last=last, residual=True, activation="relu")
        for shape in ((32, 64, 56, 56), (32, 256, 28, 28))
        for last in _LAYOUTS
    ),
)

CASES = _FORWARD + _BACKWARD + _FUSED

# A dozen for the README, which shows every case that fastnorm loses as well.
SHOWN = (
    _layer((8, 768)),
    _layer((4096, 768)),
    _rms((4096, 768)),
    _group((8, 256, 32, 32)),
    _group((8, 256, 32, 32), channels_last=True),
    _instance((8, 64, 64, 64)),
    _training((32, 64, 56, 56)),
    _inference((32, 64, 56, 56)),
    _layer((4096, 768), backward=True),
    _group((8, 256, 32, 32), backward=True),
    _group((8, 256, 32, 32), activation="silu"),
    _add_rms((4096, 768)),
    _inference((32, 64, 56, 56), residual=True, activation="relu"),
)

# Over 100 MB, each group within 1 MB: what is left is the traffic with memory.
OUT = tuple(
    replace(case, out=True)
    for case in (
        _layer((8192, 4096)),
        _rms((8192, 4096)),
        _group((8, 256, 128, 128)),
        _instance((8, 64, 256, 256)),
        _inference((64, 128, 64, 64)),
    )
)

# Input and result fit in the last level of cache of a small server; and one plane of 67 MB.
THREADS = (
    _layer((4096, 768)),
    _rms((4096, 768)),
    _group((8, 256, 32, 32)),
    _group((8, 256, 32, 32), channels_last=True),
    _instance((8, 64, 64, 64)),
    _training((64, 512, 8, 8)),
    _training((64, 512, 8, 8), channels_last=True),
    _inference((64, 512, 8, 8)),
    replace(_layer((4096, 768)), backward=True),
    replace(_group((8, 256, 32, 32)), backward=True),
    _instance((1, 1, 256, 256, 256)),
)


def cliff(size: int) -> tuple[Case, ...]:
    """Cases whose x has `size` bytes: more rows, or more samples of 64 kB, of the same kind."""
    return _layer((size // 4096, 1024)), _group((size // 65536, 64, 16, 16))


CLIFF = tuple(case for power in range(16, 32) for case in cliff(1 << power))  # 64 kB to 2 GB

# For the gate: every kernel, small enough for caches, where timing is steady.
_ROWS, _PLANES = (64, 768), (2, 64, 32, 32)
_GATE_FORWARD = (
    _layer((1, 64)),
    _layer((8, 768)),
    _layer(_ROWS),
    _layer((1024, 1024)),
    _rms(_ROWS),
    _group((2, 64, 8, 8)),
    _group(_PLANES),
    _group(_PLANES, channels_last=True),
    _instance((2, 32, 64, 64)),
    _training((8, 64, 16, 16)),
    _training((8, 64, 16, 16), channels_last=True),
    _inference((8, 64, 16, 16)),
    _inference((8, 64, 16, 16), channels_last=True),
    _layer(_ROWS, dtype="bfloat16"),
    _layer(_ROWS, dtype="float64"),
    _group(_PLANES, dtype="bfloat16"),
)
GATE = (
    *_GATE_FORWARD,
    *(
        replace(case, backward=True)
        for case in (
            _layer(_ROWS),
            _rms(_ROWS),
            _group(_PLANES),
            _group(_PLANES, channels_last=True),
            _training((8, 64, 16, 16)),
            _training((8, 64, 16, 16), channels_last=True),
        )
    ),
    _group(_PLANES, activation="silu"),
    _add_rms(_ROWS),
    _inference((8, 64, 16, 16), residual=True, activation="relu"),
    _layer((9216, 1024), out=True),  # non-temporal stores
)
# Of these on two threads.
GATE_THREADS = (_layer((1024, 1024)),)
