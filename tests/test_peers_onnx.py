"""ONNX's own cases for its normalization operators, as its package ships them.

A case comes twice or more: as a node, and "expanded" to the nodes that the operator stands for,
with the same inputs and results. What is expanded is here the same call.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import numpy as np
import pytest

import fastnorm as fn

onnx = pytest.importorskip("onnx")
node = pytest.importorskip("onnx.backend.test.case.node")


def batch(a: Any, x: Any, scale: Any, b: Any, mean: Any, var: Any) -> Any:
    eps = a.get("epsilon", 1e-5)
    if not a.get("training_mode"):
        return [fn.batch_norm(x, mean, var, scale, b, eps=eps)]
    moved, share = (mean.copy(), var.copy()), 1 - a.get("momentum", 0.9)
    y = fn.batch_norm(x, *moved, scale, b, True, share, eps)
    axes = (0, *range(2, x.ndim))
    biased = (1 - share) * var + share * fn.moments(x, axes)[1]  # see docs/differences.rst
    np.testing.assert_allclose(
        moved[1], (1 - share) * var + share * fn.moments(x, axes, ddof=1)[1], rtol=1e-6
    )
    return [y, moved[0], biased]


def layer(a: Any, x: Any, *parameters: Any) -> Any:
    axes, eps = tuple(range(a.get("axis", -1) % x.ndim, x.ndim)), a.get("epsilon", 1e-5)
    return fn.layer_norm(x, None, *parameters, eps=eps, axis=axes, return_stats=True)


def rms(a: Any, x: Any, scale: Any) -> Any:
    axes = tuple(range(a.get("axis", -1) % x.ndim, x.ndim))
    return [fn.rms_norm(x, None, scale, a.get("epsilon", 1e-5), axis=axes)]


def group(a: Any, x: Any, *parameters: Any) -> Any:
    return [fn.group_norm(x, a["num_groups"], *parameters, a.get("epsilon", 1e-5))]


def instance(a: Any, x: Any, scale: Any, b: Any) -> Any:
    return [fn.instance_norm(x, weight=scale, bias=b, eps=a.get("epsilon", 1e-5))]


def length(a: Any, x: Any) -> Any:
    assert a.get("p", 2) == 2
    return [fn.l2_normalize(x, a.get("axis", -1))]


def response(a: Any, x: Any) -> Any:
    options = a.get("alpha", 1e-4), a.get("beta", 0.75), a.get("bias", 1.0)
    return [fn.local_response_norm(x, a["size"], *options)]


def mean_variance(a: Any, x: Any) -> Any:
    return [fn.standardize(x, tuple(a.get("axes", (0, 2, 3))))]


CALLS = {
    "BatchNormalization": (batch, "batch_normalization"),
    "GroupNormalization": (group, "groupnormalization"),
    "InstanceNormalization": (instance, "instance_normalization"),
    "LRN": (response, "lrn"),
    "LayerNormalization": (layer, "layernormalization"),
    "LpNormalization": (length, "lpnormalization"),
    "MeanVarianceNormalization": (mean_variance, "meanvariancenormalization"),
    "RMSNormalization": (rms, "rmsnormalization"),
}


def cases() -> dict[str, tuple[Any, Any]]:
    """Each case by its name: the node of the operator, and the case."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing computes what is expected
        for _, module in CALLS.values():
            importlib.import_module(f"{node.__name__}.{module}")
    nodes = {}
    for case in node._NodeTestCases:
        (first, *others) = case.model.graph.node
        if not others and first.op_type in CALLS:
            nodes[case.name] = first
    found = {}
    for case in node._NodeTestCases:
        operator = nodes.get(case.name.partition("_expanded")[0])
        if operator is not None:
            found[case.name] = operator, case
    return found


def attributes(operator: Any) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in operator.attribute}


CASES = cases()
OTHERS = {name for name, (operator, _) in CASES.items() if attributes(operator).get("p", 2) != 2}


def test_all_but_three_cases_are_there() -> None:
    """The three are of p = 1: see docs/differences.rst."""
    assert len(OTHERS) == 3
    assert len(CASES) >= 116
    assert {operator.op_type for operator, _ in CASES.values()} == set(CALLS)


@pytest.mark.parametrize("name", sorted(CASES.keys() - OTHERS))
def test_case(name: str) -> None:
    operator, case = CASES[name]
    assert case.data_sets
    for inputs, outputs in case.data_sets:
        given = [value.copy() for value in inputs]
        found = CALLS[operator.op_type][0](attributes(operator), *given)
        for y, right in zip(found, outputs):
            assert y.shape == right.shape
            # what ONNX allows: its numbers are of float32, computed in NumPy
            np.testing.assert_allclose(y, right, rtol=case.rtol, atol=case.atol)
        for value, before in zip(given, inputs):
            np.testing.assert_array_equal(value, before)
