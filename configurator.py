"""Settings from config files and --key=value onto one typed dataclass, and the frame of every command.

    python train.py config/one_gpu_prune.py --calibration=128 --domains=wiki,book --resume

A config file is Python assignments of numbers, texts, lists and arithmetic on numbers. It is read and never run. Names
that start with an underscore are its own business. Every other name and every type is checked against the dataclass.
Later settings win.
"""

import ast
import difflib
import inspect
import math
import operator
import re
import sys
import typing
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.USub: operator.neg,
}


class UserError(Exception):
    """What a user can put right. The message is one line: what is wrong, where, and what to do."""


class Stopped(Exception):
    """A run was asked to stop and has saved itself. The message says how to go on."""


def load(config_class: type, arguments: list[str]):
    """The dataclass with the settings of config files and --key=value arguments, in their order. Raises UserError."""
    hints, settings = typing.get_type_hints(config_class), {}
    for argument in arguments:
        if not argument.startswith("--"):
            settings |= _from_file(argument, hints)
            continue
        key, equals, text = argument[2:].partition("=")
        kind = _kind(key, hints, "command line")
        if not equals and kind is not bool:
            raise UserError(f"command line: --{key} needs a value: --{key}=...")
        settings[key] = _typed(key, _parsed(text if equals else "true", kind), kind, "command line")
    return config_class(**settings)


def _from_file(path: str, hints: dict) -> dict:
    names: dict = {}
    try:
        for statement in ast.parse(Path(path).read_bytes()).body:
            if isinstance(statement, ast.Assign):
                value = _value(statement.value, names)
                for target in statement.targets:
                    names |= _assigned(target, value)
            elif not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):  # a docstring
                raise SyntaxError(f"line {statement.lineno}: a config file has assignments only: name = value")
    except (SyntaxError, ValueError, TypeError, ArithmeticError, OSError) as error:
        raise UserError(f"{path}: not a config file: {error}") from None
    settings = {name: value for name, value in names.items() if not name.startswith("_")}
    return {name: _typed(name, value, _kind(name, hints, path), path) for name, value in settings.items()}


def _assigned(target: ast.expr, value: object) -> dict:
    """a = 1 or a, b = 1, 2"""
    pairs = [*zip(target.elts, value, strict=True)] if isinstance(target, ast.Tuple) else [(target, value)]
    if not all(isinstance(t, ast.Name) for t, _ in pairs):
        raise SyntaxError(f"line {target.lineno}: only names are assigned to: name = value")
    return {t.id: v for t, v in pairs}


def _value(node: ast.expr, names: dict):
    """A constant, a name from further up, a tuple, a list (as a tuple), or + - * / // of numbers."""
    match node:
        case ast.Constant(value):
            return value
        case ast.Name(name) if name in names:
            return names[name]
        case ast.Tuple(items) | ast.List(items):
            return tuple(_value(item, names) for item in items)
        case ast.UnaryOp(op, operand) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(operand, names))
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left, names), _value(right, names))
    raise SyntaxError(
        f"line {node.lineno}: {ast.unparse(node)!r}: expected a number, a text, True, False, a list, a name from "
        "further up, or + - * / // of numbers"
    )


def _kind(name: str, hints: dict, where: str) -> type:
    if name not in hints:
        near = difflib.get_close_matches(name, hints, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"settings are {', '.join(hints)}"
        raise UserError(f"{where}: unknown setting {name!r}; {hint}")
    return hints[name]


def _parsed(text: str, kind: type):
    """A command line's text as a value of this kind; the text itself where it is none."""
    if kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return tuple(_parsed(part.strip(), item) for part in text.split(",") if part.strip())
    for number in (int, float) if kind in (int, float) else ():
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _typed(name: str, value, kind: type, where: str):
    """value as `kind`: an int serves as a float, and nothing else as anything else; ~ begins a path at home."""
    if typing.get_origin(kind) is tuple and isinstance(value, tuple):
        return tuple(_typed(name, v, typing.get_args(kind)[0], where) for v in value)
    if kind is float and type(value) is int:
        return float(value)
    if kind is str and isinstance(value, str) and value.startswith("~/"):
        return str(Path(value).expanduser())
    if type(value) is not kind or (kind is float and math.isnan(value)):
        raise UserError(f"{where}: setting {name} must be {_name_of(kind)}, is {value!r}")
    return value


def _name_of(kind: type) -> str:
    return f"a list of {typing.get_args(kind)[0].__name__}" if typing.get_origin(kind) is tuple else kind.__name__


# ---- what the settings mean: --help, docs/configuration.md, the start of a run


def explained(config_class: type) -> list[tuple[str, str, str, str]]:
    """(section, name, default, comment) of every field, as they stand in the dataclass's source."""
    section, found = "", []
    for line in inspect.getsource(config_class).splitlines():
        if heading := re.fullmatch(r"    # (.+)", line):
            section = heading[1]
        elif setting := re.fullmatch(r"    (\w+): [^=]+ = (.*?)(?:  # (.*))?", line):
            found.append((section, setting[1], setting[2].replace('""', ""), setting[3] or ""))
    return found


def help_of(config_class: type) -> str:
    lines = [(f"--{name}={default}", comment) for _, name, default, comment in explained(config_class)]
    return "\n".join(f"  {setting:36}  {comment}".rstrip() for setting, comment in lines)


def differing(config) -> str:
    """One line a setting that is not at its default."""
    values = ((f.name, getattr(config, f.name), f.default) for f in fields(config))
    return "\n".join(f"  {name} = {value!r}" for name, value, default in values if value != default)


def markdown(config_class: type) -> str:
    """The table of docs/configuration.md."""
    lines, last = [], ""
    for section, name, default, comment in explained(config_class):
        if section != last:
            lines += [
                "",
                f"**{section[0].upper()}{section[1:]}**",
                "",
                "| setting | default | meaning |",
                "|---|---|---|",
            ]
        last, meaning = section, comment.replace("|", "\\|")
        lines.append(f"| `{name}` | {default and f'`{default}`'} | {meaning} |")
    return "\n".join(lines).strip() + "\n"


# ---- the frame of every command


def command(
    main: Callable,
    config_class: type,
    words: tuple[int, int] = (0, 0),
    config_files: bool = False,
    speaks: Callable[[str], bool] = lambda _: True,
) -> None:
    """Run main(settings, *words) on the command line; the one handler of errors, which end the process.

    words: least and most number of arguments that are not settings. config_files: those are config files instead.
    speaks: whether this process is to print an error; of many ranks that have the same, one is.
    """
    doc, arguments = sys.modules[main.__module__].__doc__, sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(f"{doc}\nSettings, with their defaults:\n\n{help_of(config_class)}")
        sys.exit()
    given = [] if config_files else [a for a in arguments if not a.startswith("--")]
    if (config_files or words[1]) and not arguments:
        sys.exit(f"{doc}\n--help lists the settings.")
    try:
        if not words[0] <= len(given) <= words[1]:
            expected = f"at least {words[0]}" if len(given) < words[0] else f"at most {words[1]}"
            raise UserError(f"{len(given)} arguments beside the settings, expected {expected}: see --help")
        main(load(config_class, [a for a in arguments if a not in given]), *given)
    except (UserError, OSError) as error:  # a full disk, a file that is not there
        if speaks(str(error)):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except Stopped as stopped:
        if speaks(str(stopped)):
            print(stopped, flush=True)
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    import train

    print("# Settings of train.py\n\nMade by `make docs` from the comments in `train.Config`.\n")
    print(markdown(train.Config), end="")
