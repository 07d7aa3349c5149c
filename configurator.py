"""Settings from a config file and --key=value onto one typed dataclass.

    python train.py config/prune.py --max_steps=100 --domains=python,wiki --resume

A config file is Python assignments of numbers, texts, lists and arithmetic on numbers, read and never run; names that
start with an underscore are its own business. Every other name and every type is checked against the dataclass; later
settings win.
"""

import ast
import difflib
import math
import operator
import typing
from dataclasses import fields
from pathlib import Path

MAX_FILE_BYTES = 1 << 20
LARGEST = 2**63  # an int beyond is no setting
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.USub: operator.neg, ast.UAdd: operator.pos}  # fmt: skip


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it, where it came from and what was expected."""


def load(config_class: type, arguments: list[str]):
    """The dataclass with the settings of the config files and --key=value arguments, in their order.

    Raises ConfigError on an unknown name (with a suggestion), a wrong type or an unreadable file.
    """
    hints, settings = typing.get_type_hints(config_class), {}
    for argument in arguments:
        if not argument.startswith("--"):
            settings |= _from_file(argument, hints)
            continue
        key, equals, text = argument[2:].partition("=")
        _known(key, hints, "command line")
        settings[key] = _parsed(key, text if equals else "true", hints[key], equals or hints[key] is bool)
    return config_class(**settings)


def _from_file(path: str, hints: dict) -> dict:
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such config file")
    settings = {name: value for name, value in _assignments(path).items() if not name.startswith("_")}
    for name, value in settings.items():
        _known(name, hints, path)
        settings[name] = _typed(name, value, hints[name], path)
    return settings


def _assignments(path: str) -> dict:
    """Names and values of a config file. Raises ConfigError for all that is not an assignment of plain values."""
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
        if len(text) > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: over {MAX_FILE_BYTES:,} bytes: not a config file")
        names: dict = {}
        for statement in ast.parse(text).body:
            if isinstance(statement, ast.Assign):
                value = _value(statement.value, names)
                for target in statement.targets:
                    names |= _assigned(target, value)
            elif not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):  # a docstring
                raise SyntaxError(f"line {statement.lineno}: a config file has assignments only: name = value")
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError, OSError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: cannot be read: {type(error).__name__}: {error}") from None
    return names


def _assigned(target: ast.expr, value) -> dict:
    """a = 1 or a, b = 1, 2"""
    if isinstance(target, ast.Name):
        return {target.id: value}
    if not isinstance(target, ast.Tuple | ast.List) or not all(isinstance(t, ast.Name) for t in target.elts):
        raise SyntaxError(f"line {target.lineno}: only names are assigned to: name = value")
    if not isinstance(value, tuple) or len(value) != len(target.elts):
        raise SyntaxError(f"line {target.lineno}: expected {len(target.elts)} values for as many names")
    return {t.id: v for t, v in zip(target.elts, value, strict=True)}


def _value(node: ast.expr, names: dict):
    """A constant, a name from further up, a tuple, a list (as a tuple), or + - * / // of numbers."""
    if isinstance(node, ast.Constant):
        value = node.value
    elif isinstance(node, ast.Name) and node.id in names:
        value = names[node.id]
    elif isinstance(node, ast.Tuple | ast.List):
        value = tuple(_value(item, names) for item in node.elts)
    elif isinstance(node, ast.BinOp | ast.UnaryOp) and type(node.op) in OPERATORS:
        parts = [node.left, node.right] if isinstance(node, ast.BinOp) else [node.operand]
        numbers = [_value(part, names) for part in parts]
        if not all(type(number) in (int, float) for number in numbers):
            raise SyntaxError(f"line {node.lineno}: arithmetic is for numbers only")
        value = OPERATORS[type(node.op)](*numbers)
    else:
        raise SyntaxError(f"line {node.lineno}: {ast.unparse(node)[:80]!r}: expected a number, a text, True, False, a "
                          "list, a name from further up, or + - * / // of numbers")
    if (type(value) is int and abs(value) >= LARGEST) or (type(value) is float and not math.isfinite(value)):
        raise SyntaxError(f"line {node.lineno}: too large a number")
    return value


def _known(name: str, hints: dict, where: str) -> None:
    if name not in hints:
        near = difflib.get_close_matches(name, hints, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"settings are {', '.join(hints)}"
        raise ConfigError(f"{where}: unknown setting {name!r}; {hint}")


def _parsed(name: str, text: str, kind: type, has_value: bool):
    if not has_value:
        raise ConfigError(f"command line: --{name} needs a value: --{name}=...")
    if kind is bool:
        value = {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    elif typing.get_origin(kind) is tuple:
        of_text = typing.get_args(kind)[0] is str
        parts = [part.strip() for part in text.split(",")] if text else []
        value = tuple(part if of_text else _number_or_text(part) for part in parts)
    else:
        value = text if kind is str else _number_or_text(text)
    return _typed(name, value, kind, "command line")


def _number_or_text(text: str):
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text


def _typed(name: str, value, kind: type, where: str):
    """value as `kind`; an int serves as a float, a list as a tuple, and nothing else as anything else."""
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}: setting {name} must be a tuple of {item.__name__}, is {value!r}")
        return tuple(_typed(name, v, item, where) for v in value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{where}: setting {name} must be {kind.__name__}, is {type(value).__name__} {value!r}")
    if kind is int and abs(value) >= LARGEST:
        raise ConfigError(f"{where}: setting {name}: too large a number")
    return value


def described(config) -> str:
    """One line a setting, those that differ from their default marked."""
    return "\n".join(
        f"  {'*' if getattr(config, f.name) != f.default else ' '} {f.name} = {getattr(config, f.name)!r}"
        for f in fields(config)
    )
