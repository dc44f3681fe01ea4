"""Norms joined with what follows them, in the forward of the modules that call them.

A forward is joined where two things are proven: its source is a fixed sequence of calls and
arithmetic, so torch.fx sees all that it does; and nothing is asked of what the norm gives but the
sum or the activation that follows it.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import operator
import textwrap
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fastnorm.torch.classes import Replaced, activation_of, is_watched

# --- Forwards that are a fixed sequence -----------------------------------------------------------

_STATEMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Return, ast.If, ast.Pass)
_EXPRESSIONS = (
    ast.Name, ast.Attribute, ast.Call, ast.BinOp, ast.UnaryOp, ast.Constant, ast.Tuple, ast.List,
    ast.keyword, ast.expr_context, ast.operator, ast.unaryop, ast.arguments, ast.arg,
)  # fmt: skip


def is_fixed_sequence(module: nn.Module) -> bool:
    """Whether a forward does the same for every input, of required tensors alone."""
    forward = type(module).forward
    # what wraps it is not in the source, and variables of a function around it may change
    if not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__"):
        return False
    if set(forward.__code__.co_freevars) - {"__class__"}:
        return False
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(forward))).body
    except (OSError, SyntaxError, TypeError, ValueError):  # there is no source
        return False
    if not isinstance(tree, ast.FunctionDef) or tree.decorator_list:
        return False
    given = tree.args
    if given.defaults or given.kwonlyargs or given.vararg or given.kwarg or len(given.args) < 2:
        return False
    own = given.args[0].arg
    return all(_is_plain_statement(one, own, module) for one in tree.body)


def _is_plain_statement(statement: ast.stmt, own: str, module: nn.Module) -> bool:
    if isinstance(statement, ast.If):
        if not _is_fixed(statement.test, own, module):
            return False
        asked = compile(ast.Expression(statement.test), "<condition>", "eval")
        taken = statement.body if eval(asked, {own: module}) else statement.orelse
        return all(_is_plain_statement(one, own, module) for one in taken)
    if not isinstance(statement, _STATEMENTS):
        return False
    parts = list(ast.iter_child_nodes(statement))
    if isinstance(statement, ast.AnnAssign):
        parts.remove(statement.annotation)
    return all(_is_plain_expression(node, own, module) for part in parts for node in ast.walk(part))


def _is_plain_expression(node: ast.AST, own: str, module: nn.Module) -> bool:
    """Whether it is no constant to torch.fx that may be another tomorrow."""
    if not isinstance(node, _EXPRESSIONS):
        return False
    if isinstance(node, ast.Call):
        return _is_plain_call(node.func, own, module)
    if isinstance(node, ast.Name):
        return (
            node.id in _locals(module)
            or node.id in _helpers(module)
            or _is_pytorch(_globals_of(module).get(node.id))
        )
    if not isinstance(node, ast.Attribute):
        return True
    path, root = _path(node)
    if not isinstance(node.ctx, ast.Load) or not isinstance(root, ast.Name) or root.id != own:
        return isinstance(node.ctx, ast.Load)
    found = module
    for name in path:
        found = getattr(found, name, None)
        if isinstance(found, nn.Parameter):
            return True
    return isinstance(found, nn.Module)


def _path(node: ast.expr) -> tuple[list[str], ast.expr]:
    """The names of nested attributes, and whose they are."""
    path: list[str] = []
    while isinstance(node, ast.Attribute):
        path.insert(0, node.attr)
        node = node.value
    return path, node


def _globals_of(module: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = type(module).forward.__globals__
    return found


def _helpers(module: nn.Module) -> dict[str, FunctionType]:
    """The functions that a forward calls by name: whatever they do, each call is one step."""
    forward = type(module).forward
    found = {name: _globals_of(module).get(name) for name in forward.__code__.co_names}
    return {
        name: function
        for name, function in found.items()
        if isinstance(function, FunctionType) and function.__qualname__.isidentifier()
    }


def _locals(module: nn.Module) -> tuple[str, ...]:
    found: tuple[str, ...] = type(module).forward.__code__.co_varnames
    return found


def _is_pytorch(found: Any) -> bool:
    """Whether it is a module of PyTorch, whose functions and constants stay as they are."""
    return isinstance(found, ModuleType) and found.__name__.partition(".")[0] == "torch"


def _is_fixed(test: ast.expr, own: str, module: nn.Module) -> bool:
    """Whether a condition asks only what a module has, and nothing that is computed."""
    fixed = (
        ast.Attribute, ast.Name, ast.Compare, ast.BoolOp, ast.UnaryOp, ast.Constant, ast.Is,
        ast.IsNot, ast.boolop, ast.Not, ast.expr_context,
    )  # fmt: skip
    return all(
        isinstance(node, fixed)
        and not (isinstance(node, ast.Name) and node.id != own)
        and not (isinstance(node, ast.Attribute) and _may_turn(node, module))
        for node in ast.walk(test)
    )


def _may_turn(attribute: ast.Attribute, module: nn.Module) -> bool:
    """Whether an attribute is the mode, or has code that may ask for it."""
    path, _ = _path(attribute)
    if "training" in path:
        return True
    found: Any = module
    for name in path:
        if hasattr(inspect.getattr_static(type(found), name, None), "__get__"):
            return True
        found = getattr(found, name, None)
    return False


# Of functions that tell how things stand when they are called: a grad mode, a dtype, a seed.
_ASKS = ("is_", "get_", "current_", "initial_", "default_")


def _is_plain_call(function: ast.expr, own: str, module: nn.Module) -> bool:
    """Whether what is called is a module, a function, or a method of a tensor."""
    path, root = _path(function)
    if isinstance(root, ast.Call):
        return True  # a method of what that gave
    if not isinstance(root, ast.Name):
        return False
    if not path:
        return root.id in _helpers(module)
    if root.id != own and root.id in _locals(module):
        return len(path) == 1  # a method of a local tensor
    found: Any = module if root.id == own else _globals_of(module).get(root.id)
    if found is None or (root.id != own and path[-1].startswith(_ASKS)):
        return False
    for name in path:
        if isinstance(found, nn.Parameter):
            return True
        found = getattr(found, name, None)
    if isinstance(found, nn.Module):
        return True
    of = getattr(found, "__module__", None) or ""
    return of.startswith("torch") or found is getattr(torch._C._VariableFunctions, path[-1], ())


# --- Joining --------------------------------------------------------------------------------------


class _Proxy(fx.Proxy):
    """Of which ``y += x`` is not ``y = y + x``."""


def _in_place(function: Any) -> Callable[[Any, Any], Any]:
    return lambda own, other: own.tracer.create_proxy("call_function", function, (own, other), {})


_IN_PLACE = {
    name: function
    for name, function in vars(operator).items()
    if name.startswith("__i") and hasattr(fx.Proxy, f"__{name[3:]}")
}
for _name, _function in _IN_PLACE.items():
    setattr(_Proxy, _name, _in_place(_function))


class _NothingUnseen(TorchFunctionMode):
    """Refuses to compute while a forward is traced: the result would become a constant."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(issubclass(kind, fx.Proxy) for kind in types):
            raise ValueError(f"{func} is called of nothing that is traced")
        return func(*args, **(kwargs or {}))


class _Tracer(fx.Tracer):
    """Every module is one call, and so is every function that a forward calls by name."""

    def trace_forward(self, module: nn.Module) -> fx.Graph:
        kind, forward = type(module), type(module).forward
        helpers = {name: self._step(function) for name, function in _helpers(module).items()}
        names = forward.__globals__ | helpers
        seen = FunctionType(forward.__code__, names, "forward", None, forward.__closure__)
        object.__setattr__(module, "__class__", type(kind.__name__, (kind,), {"forward": seen}))
        try:
            with _NothingUnseen():
                return self.trace(module)
        finally:
            object.__setattr__(module, "__class__", kind)

    def _step(self, function: FunctionType) -> Callable[..., Any]:
        return lambda *given, **named: self.create_proxy("call_function", function, given, named)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor) and not any(a is own for own in self.root.parameters()):
            # made while it was traced, perhaps at random; `joined` leaves such a forward as it is
            raise ValueError("a tensor that is no parameter would become a constant")
        if isinstance(a, nn.Module):
            return self.create_node("get_attr", self.path_of_module(a), (), {})
        return super().create_arg(a)


_SUMS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add)
_METHODS = {"relu": "relu", "relu_": "relu"}
_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu", torch.relu: "relu", F.relu_: "relu", torch.relu_: "relu", F.silu: "silu",
    F.relu6: "relu6",
}  # fmt: skip


def _activation_of(node: fx.Node, module: nn.Module) -> str | None:
    """Which of the activations that a norm has a node is."""
    if node.op == "call_module":
        return activation_of(module.get_submodule(str(node.target)))
    if len(node.args) != 1 or set(node.kwargs) - {"inplace", "approximate"}:
        return None
    if node.op == "call_method":
        return _METHODS.get(str(node.target))
    if node.target is F.gelu:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(
            str(node.kwargs.get("approximate", "none"))
        )
    return _FUNCTIONS.get(node.target)


def _calls_helper(node: fx.Node) -> bool:
    """Whether a node calls a function by name that is not PyTorch's."""
    function = node.target
    return isinstance(function, FunctionType) and not function.__module__.startswith("torch.")


def _writes(node: fx.Node, module: nn.Module) -> bool:
    """Whether a node may change a tensor that it is given."""
    if node.op == "call_module":
        inside = module.get_submodule(str(node.target)).modules()
        return any(
            getattr(one, "inplace", False)
            or not type(one).__module__.startswith("torch.nn.")
            or is_watched(one)
            for one in inside
        )
    if _calls_helper(node):
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "_")
    return (
        name.endswith("_")
        or bool(node.kwargs.get("inplace"))
        or "out" in node.kwargs
        or node.target in _IN_PLACE.values()
    )


def _calls(node: fx.Node, norm: nn.Module, module: nn.Module) -> bool:
    """Whether a node calls this norm, too: running statistics move in the order of its calls."""
    if node.op != "call_module":
        return False
    return any(one is norm for one in module.get_submodule(str(node.target)).modules())


def _norms(graph: fx.Graph, module: nn.Module) -> Iterator[fx.Node]:
    for node in list(graph.nodes):
        if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
            norm = module.get_submodule(str(node.target))
            if getattr(type(norm), "joins", False) and not is_watched(norm):
                yield node


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


def _join_sum(norm: fx.Node, module: nn.Module) -> None:
    """norm(x) + r as one call, where that is all that is asked of norm(x)."""
    total = _only_user(norm)
    if total is None or total.op != "call_function" or total.target not in _SUMS:
        return
    if len(total.args) != 2 or total.kwargs:
        return
    first, second = total.args
    other = second if first is norm else first
    if not isinstance(other, fx.Node) or other is norm:
        return
    in_place = total.target is operator.iadd
    if in_place and first is not norm:
        return  # the other is what is changed
    (x,) = norm.args
    if not isinstance(x, fx.Node):
        return
    itself = module.get_submodule(str(norm.target))
    if any(_writes(n, module) or _calls(n, itself, module) for n in _between(norm, total)):
        return
    total.prepend(norm)  # behind all that the sum waits for
    norm.kwargs = {"residual": other, "in_place": in_place}
    _take_place(norm, total)


def _join_activation(norm: fx.Node, module: nn.Module) -> None:
    """act(norm(x)) as one call, where that is all that is asked of norm(x)."""
    act = _only_user(norm)
    if act is None or not act.args or act.args[0] is not norm:
        return
    name = _activation_of(act, module)
    if name is not None:
        norm.kwargs = {**norm.kwargs, "activation": name}
        _take_place(norm, act)


def _take_place(norm: fx.Node, node: fx.Node) -> None:
    node.replace_all_uses_with(norm)
    node.graph.erase_node(node)


class Joined:
    """Before the class of a module, `_replaces`, among the bases of the one with another forward.

    Copies and pickles have the forward that it replaces: what was proven is of one module.
    """

    _replaces: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        made: Any = super().__reduce_ex__(protocol)
        kind, replaces = type(self), self._replaces
        given = tuple([replaces if a is kind else a for a in made[1]])
        return _made, (replaces if made[0] is kind else made[0], given), *made[2:]


def _made(function: Any, given: tuple[Any, ...]) -> Any:
    return function(*given)


def _is_taken_apart(node: fx.Node) -> bool:
    """Whether parts are taken of what a helper gives: it may be an iterator."""
    return _calls_helper(node) and any(user.target is operator.getitem for user in node.users)


def _is_sequential(kind: type[nn.Module]) -> bool:
    """Whether the forward is PyTorch's that calls one module after the other."""
    own = nn.Sequential
    return issubclass(kind, own) and all(
        getattr(kind, name) is getattr(own, name) for name in ("forward", "__iter__")
    )


def joined(module: nn.Module) -> type | None:
    """A class for this module whose forward has its norms joined with what follows; or None."""
    kind = type(module)
    if isinstance(module, Replaced) or not (_is_sequential(kind) or is_fixed_sequence(module)):
        return None
    try:
        graph = _Tracer().trace_forward(module)
    except Exception:  # whatever a forward does that is not seen
        return None
    if any(_is_taken_apart(node) for node in graph.nodes):
        return None
    norms = list(_norms(graph, module))
    for norm in norms:
        _join_sum(norm, module)
        _join_activation(norm, module)
    if not any(norm.kwargs for norm in norms):
        return None
    code = graph.python_code("self")
    made: dict[str, Any] = dict(code.globals)
    file = f"<{kind.__name__} with joined norms, {id(module)}>"
    linecache.cache[file] = (len(code.src), None, code.src.splitlines(True), file)  # for tracebacks
    exec(compile(code.src, file, "exec"), made)
    forward: Callable[..., Any] = made["forward"]
    own = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "forward": forward}
    found = type(kind.__name__, (Joined, kind), own)
    type.__setattr__(found, "_replaces", kind)
    return found
