"""Give a module a method whose functional calls are calls of child modules, by editing the method's source.

Editing, not tracing: control flow, training flags, attributes and side effects stay as they were written, the class
stays a subclass of the user's, and the module can be copied and pickled.
"""

from __future__ import annotations
import __future__

import ast
import copy
import inspect
import linecache
import textwrap
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import CodeType
from typing import Any

from torch import nn

# Why source is edited: a kink that a forward calls as a function has no module to replace and no place for its β, and
# left alone it makes the curvature infinite. A traced graph would freeze branches, flags and loops; a mode or a patch
# would have to be on in every forward, copy and process. May go when torch can hook functional calls for good.
Build = tuple[Callable[..., nn.Module], tuple[str, ...]]  # module class, names of the arguments after the input
Functions = Mapping[Any, Build]  # of functions, and of methods of tensors by their names


class CannotRewriteError(Exception):
    """The source of a method is not there, or not of a form that can be edited safely."""


@dataclass(frozen=True)
class Method:
    """The edited source of one method."""

    name: str
    source: str
    defined_in: type[nn.Module]  # what a super() without arguments refers to


@dataclass
class _Edit(ast.NodeTransformer):
    """Replaces calls of known functions by calls of new child modules, which it collects in ``created``."""

    scope: Callable[..., Any]  # the method
    receiver: str  # its name for self
    functions: Functions
    separate: Collection[str]  # children that get a sibling for every call after the first
    taken: set[str]
    created: dict[str, nn.Module | str] = field(default_factory=dict)  # a string: a copy of that child
    called: set[str] = field(default_factory=set)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        child = self._child_of(node.func)
        if child in self.separate:
            if child in self.called:
                node.func = self._new_child(child, child)
            self.called.add(child)
            return node
        function, arguments = self._function_of(node)
        if function is None or not arguments:
            return node
        keywords = [keyword for keyword in node.keywords if keyword.arg != "input"]
        module = _build(self.functions[function], arguments[1:], keywords)
        if module is None:
            return node
        name = self._new_child(type(module).__name__.lower(), module)
        return ast.Call(func=name, args=[arguments[0]], keywords=[])

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        """``F.relu_(x)`` as a statement becomes ``x = self.relu_1(x)``, for the module works out of place."""
        name = self._overwritten(node.value)
        call = self.visit(node.value)
        if name is not None and call is not node.value:
            assign = ast.Assign(targets=[ast.Name(id=name, ctx=ast.Store())], value=call)
            return ast.copy_location(assign, node)
        node.value = call
        return node

    def _overwritten(self, node: ast.expr) -> str | None:
        """Name of the variable whose tensor a call of a known function changes in place, if it is one."""
        function, arguments = self._function_of(node) if isinstance(node, ast.Call) else (None, [])
        if function is None or not arguments or not isinstance(arguments[0], ast.Name):
            return None
        assert isinstance(node, ast.Call)
        given = dict(zip(self.functions[function][1], arguments[1:], strict=False))
        given |= {str(keyword.arg): keyword.value for keyword in node.keywords}
        inplace = given.get("inplace")
        overwrites = isinstance(inplace, ast.Constant) and bool(inplace.value)
        spelled = function if isinstance(function, str) else function.__name__
        return arguments[0].id if overwrites or spelled.endswith("_") else None

    def _child_of(self, node: ast.expr) -> str:
        is_attribute = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        return node.attr if is_attribute and node.value.id == self.receiver else ""  # type: ignore[attr-defined]

    def _new_child(self, stem: str, module: nn.Module | str) -> ast.Attribute:
        number = next(i for i in range(1, 10_000) if f"{stem}_{i}" not in self.taken)
        name = f"{stem}_{number}"
        self.taken.add(name)
        self.created[name] = module
        return ast.Attribute(value=ast.Name(id=self.receiver, ctx=ast.Load()), attr=name, ctx=ast.Load())

    def _function_of(self, node: ast.Call) -> tuple[Any, list[ast.expr]]:
        """Return the known function that is called and its positional arguments; x.relu() counts as relu(x)."""
        function = self._resolve(node.func)
        if function is None:
            is_method = isinstance(node.func, ast.Attribute) and node.func.attr in self.functions
            if is_method and not node.args and not node.keywords and not self._child_of(node.func):
                return node.func.attr, [node.func.value]  # type: ignore[attr-defined]
            return None, []
        return function, [*(keyword.value for keyword in node.keywords if keyword.arg == "input"), *node.args]

    def _resolve(self, node: ast.expr) -> Any:
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.insert(0, node.attr)
            node = node.value
        code = self.scope.__code__
        if not isinstance(node, ast.Name) or node.id in (*code.co_varnames, *code.co_cellvars):
            return None
        value = self.scope.__globals__.get(node.id)
        for name in names:
            value = getattr(value, name, None)
        return value if is_function(value) and value in self.functions else None


def is_function(value: Any) -> bool:
    """Whether it is a plain or built-in function, so that looking it up in a table is safe."""
    return inspect.isfunction(value) or inspect.isbuiltin(value)


def edit_method(
    module: nn.Module, code: CodeType, functions: Functions, separate: Collection[str] = ()
) -> dict[str, nn.Module]:
    """Replace known functional calls in one method of a module by new children.

    Args:
        module: Changed in place: it gets the children and a subclass of its class.
        code: Code of the method, as found in a frame.
        functions: What to replace.
        separate: Children that get a copy of themselves for every call after the first.

    Returns:
        The new children by name; empty if there was nothing to replace.

    Raises:
        CannotRewriteError: If the method cannot be edited.
    """
    base: Any
    base, methods = getattr(type(module), "rewritten_from", (type(module), ()))
    if base.__reduce_ex__ is not object.__reduce_ex__ or base.__reduce__ is not object.__reduce__:
        raise CannotRewriteError(f"{base.__name__} has its own way of being copied")
    method, function = _find(module, code, methods)
    tree = _parse(method, function)
    edit = _Edit(function, _arguments(tree)[0].arg, functions, separate, set(dir(module)))
    tree = edit.visit(tree)
    if not edit.created:
        return {}
    edited = Method(method.name, ast.unparse(tree), method.defined_in)
    others = tuple(m for m in methods if m.name != method.name)
    module.__class__ = rewritten_class(base, (*others, edited))
    for name, child in edit.created.items():
        module.add_module(name, copy.deepcopy(getattr(module, child)) if isinstance(child, str) else child)
    return {name: getattr(module, name) for name in edit.created}


def _find(module: nn.Module, code: CodeType, methods: tuple[Method, ...]) -> tuple[Method, Any]:
    """Return the method with this code, its source not yet edited now, and its function."""
    for cls in type(module).__mro__:
        for name, function in vars(cls).items():
            if not (inspect.isfunction(function) and function.__code__ is code):
                continue
            if name in vars(module) or inspect.getattr_static(type(module), name) is not function:
                raise CannotRewriteError(f"{cls.__name__}.{name} is overridden")
            known = next((m for m in methods if m.name == name), None)
            return known or Method(name, _source(function), cls), function
    raise CannotRewriteError(f"`{code.co_name}` is not a method of {type(module).__name__}")


def _source(function: Callable[..., Any]) -> str:
    try:
        return textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError) as error:
        raise CannotRewriteError(f"the source of `{function.__name__}` is not available") from error


def _parse(method: Method, function: Callable[..., Any]) -> ast.FunctionDef:
    try:
        tree = ast.parse(method.source).body[0]
    except SyntaxError as error:
        raise CannotRewriteError(f"the source of `{method.name}` is not a definition of its own") from error
    if not isinstance(tree, ast.FunctionDef) or tree.decorator_list or not _arguments(tree):
        raise CannotRewriteError(f"`{method.name}` is decorated or not a plain method")
    if set(function.__code__.co_freevars) - {"__class__"}:
        raise CannotRewriteError(f"`{method.name}` uses variables of an enclosing function")
    names = {getattr(node, "attr", getattr(node, "id", "")) for node in ast.walk(tree)}
    if any(name.startswith("__") and not name.endswith("__") for name in names):
        raise CannotRewriteError(f"`{method.name}` uses private names, which belong to its class body")
    return tree


def _arguments(tree: ast.FunctionDef) -> list[ast.arg]:
    return tree.args.posonlyargs + tree.args.args


def _build(build: Build, arguments: list[ast.expr], keywords: list[ast.keyword]) -> nn.Module | None:
    """Return the module for a call with literal arguments, None for any other."""
    make, names = build
    if len(arguments) > len(names):
        return None
    given = dict(zip(names, arguments, strict=False)) | {str(k.arg): k.value for k in keywords}
    given.pop("inplace", None)  # the module is out of place in any case
    try:
        return make(**{name: ast.literal_eval(value) for name, value in given.items()})
    except (ValueError, TypeError):
        return None


# Cached, so that equal edits are one class for all blocks of a network, its copies and what is loaded, not one more for
# each. No module has a class of this name, so a pickle carries the user's class and the edited text instead
# (_reduce_ex): without that neither copy.deepcopy nor torch.save nor a spawned process could take the network.
@cache
def rewritten_class(base: Any, methods: tuple[Method, ...]) -> type[nn.Module]:
    """Return a subclass of ``base`` with the edited methods; one class for all equal requests."""
    namespace: dict[str, Any] = {method.name: _compile(method) for method in methods}
    namespace |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    namespace |= {"rewritten_from": (base, methods), "__reduce_ex__": _reduce_ex}
    make: Any = type(base)
    cls: type[nn.Module] = make(base.__name__, (base,), namespace)
    return cls


def _compile(method: Method) -> Callable[..., Any]:
    # A factory whose argument is __class__ is what super() without arguments looks for.
    text = f"def make(__class__):\n{textwrap.indent(method.source, '    ')}\n    return {method.name}\n"
    file = f"<lightning_lcnn {method.defined_in.__qualname__}.{method.name} {zlib.crc32(text.encode()):x}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)  # for tracebacks
    # annotations stay text: they may name what only type checkers import
    program = compile(text, file, "exec", flags=__future__.annotations.compiler_flag, dont_inherit=True)
    original = vars(method.defined_in)[method.name]
    scope: dict[str, Any] = {}
    exec(program, original.__globals__, scope)
    function: Callable[..., Any] = scope["make"](method.defined_in)
    return function


def _reduce_ex(self: nn.Module, protocol: Any) -> Any:
    base, methods = type(self).rewritten_from  # type: ignore[attr-defined]
    return (rebuilt, (base, methods), *base.__reduce_ex__(self, protocol)[2:])


def rebuilt(base: Any, methods: tuple[Method, ...]) -> nn.Module:
    """An object of the class with these edits, still without state: what a pickle calls."""
    cls = rewritten_class(base, methods)
    return cls.__new__(cls)
