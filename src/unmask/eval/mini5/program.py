"""Interpreter of a small subset of Python: the output of a program, and a trace, which is the work of an answer.

Owns what the subset means; no program is ever executed as text. Values are integers, strings and lists of integers.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

_OPERATORS: Mapping[type[ast.AST], Callable[[Any, Any], Any]] = {
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul},
    **{ast.Gt: operator.gt, ast.Lt: operator.lt},
}
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **{"len": len, "sum": sum, "max": max, "min": min, "sorted": sorted, "range": range},
    **{"upper": str.upper, "title": str.title},
}
Values = dict[str, Any]


def run(source: str) -> tuple[str, str]:
    """The output of a program whose last line prints a value, and a trace: a line for each statement, values for names."""
    values: Values = {}
    *statements, last = ast.parse(source).body
    trace = _run(statements, values)
    assert isinstance(last, ast.Expr)
    assert isinstance(last.value, ast.Call)
    (printed,) = last.value.args
    output = _value(printed, values)
    if not isinstance(printed, ast.Name):
        trace.append(_equal(_text(printed, values), repr(output)))
    return str(output), "\n".join(trace)


def _run(statements: Sequence[ast.stmt], values: Values) -> list[str]:
    """Run statements on `values`; their trace."""
    trace: list[str] = []
    for statement in statements:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=expression):
                trace.append(_assign(name, expression, values))
            case ast.AugAssign(target=ast.Name(id=name) as target, op=sign, value=expression):
                trace.append(_assign(name, ast.BinOp(target, sign, ast.Constant(_value(expression, values))), values))
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="append"), args=[appended])):
                values[name] = [*values[name], _value(appended, values)]
                trace.append(_equal(name, repr(values[name])))
            case ast.If(test=test, body=then, orelse=otherwise):
                holds = _value(test, values)
                trace += [f"{_text(test, values)} is {holds}", *_run(then if holds else otherwise, values)]
            case ast.For(target=ast.Name(id=name), iter=over, body=body):
                for each in _value(over, values):
                    values[name] = each
                    trace += [f"{name} = {each!r}: {line}" for line in _run(body, values)]
            case _:
                raise NotImplementedError(ast.unparse(statement))
    return trace


def _assign(name: str, expression: ast.expr, values: Values) -> str:
    computation = _text(expression, values)
    values[name] = _value(expression, values)
    return _equal(name, computation, repr(values[name]))


def _value(node: ast.expr | None, values: Values) -> Any:
    match node:
        case None:
            return None
        case ast.Constant(value=constant):
            return constant
        case ast.Name(id=name):
            return values[name]
        case ast.List(elts=elements):
            return [_value(each, values) for each in elements]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, values)
        case ast.BinOp(left=left, op=sign, right=right) | ast.Compare(left=left, ops=[sign], comparators=[right]):
            return _OPERATORS[type(sign)](_value(left, values), _value(right, values))
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return _FUNCTIONS[name](*(_value(each, values) for each in arguments))
        case ast.Call(func=ast.Attribute(value=operand, attr=name)):
            return _FUNCTIONS[name](_value(operand, values))
        case ast.Subscript(value=operand, slice=ast.Slice(lower=first, upper=last)):
            return _value(operand, values)[_value(first, values) : _value(last, values)]
        case ast.Subscript(value=operand, slice=index):
            return _value(operand, values)[_value(index, values)]
    raise NotImplementedError(ast.unparse(node))


def _text(expression: ast.expr, values: Values) -> str:
    """Source text with the values of variables in place of their names, unless they are lists."""

    class Substitution(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            value = values.get(node.id, [])  # the name of a function stays
            return node if isinstance(value, list) else ast.Constant(value)

    return ast.unparse(Substitution().visit(deepcopy(expression)))


def _equal(*sides: str) -> str:
    return " = ".join(dict.fromkeys(sides))
