"""Settings from config files and --key=value onto one typed dataclass, and the frame of every command.

    python train.py config/prune.py --max_steps=100 --domains=python,wiki --resume

A config file is Python assignments of numbers, texts, lists and arithmetic on numbers. One with anything else in it is
refused before any of it is run. Names that start with an underscore are its own business. Every other name and every
type is checked against the dataclass. Later settings win.
"""

import ast
import difflib
import inspect
import math
import re
import sys
import typing
from collections.abc import Callable
from dataclasses import fields
from itertools import groupby
from pathlib import Path

VALUES = {ast.Constant, ast.Name, ast.Load, ast.Store, ast.Tuple, ast.List}
ARITHMETIC = {ast.BinOp, ast.UnaryOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.USub}


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
    names: dict = {"__builtins__": {}}
    try:
        tree = ast.parse(Path(path).read_text())
        for statement in tree.body:
            found = {type(node) for node in ast.walk(statement)}
            is_text = found == {ast.Expr, ast.Constant}  # a docstring
            if not is_text and not {ast.Assign} <= found <= {ast.Assign} | VALUES | ARITHMETIC:
                what = "assignments only: name = a number, a text, True, False, a list, a name from further up, or "
                raise SyntaxError(f"line {statement.lineno}: a config file has {what}+ - * / // of numbers")
        exec(compile(tree, path, "exec"), names)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, NameError, OSError) as error:
        raise UserError(f"{path}: not a config file: {error}") from None
    settings = {name: value for name, value in names.items() if not name.startswith("_")}
    return {name: _typed(name, value, _kind(name, hints, path), path) for name, value in settings.items()}


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
    """value as `kind`: an int serves as a float, a list as a tuple, and nothing else as anything else; ~ begins a path
    at home."""
    if is_tuple := typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        if isinstance(value, tuple | list):
            return tuple(_typed(name, v, item, where) for v in value)
    if kind is float and type(value) is int:
        return float(value)
    if kind is str and isinstance(value, str) and value.startswith("~/"):
        return str(Path(value).expanduser())
    if type(value) is not kind or (kind is float and math.isnan(value)):
        expected = f"a list of {item.__name__}" if is_tuple else kind.__name__
        raise UserError(f"{where}: setting {name} must be {expected}, is {value!r}")
    return value


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
    text = ""
    for section, settings in groupby(explained(config_class), lambda setting: setting[0]):
        text += f"\n**{section[0].upper()}{section[1:]}**\n\n| setting | default | meaning |\n|---|---|---|\n"
        for _, name, default, comment in settings:
            meaning = comment.replace("|", "\\|")
            text += f"| `{name}` | {default and f'`{default}`'} | {meaning} |\n"
    return text.lstrip()


# ---- the frame of every command


def command(
    main: Callable,
    config_class: type,
    words: tuple[int, int] = (0, 0),
    config_files: bool = False,
    speaks: Callable[[str], bool] = lambda _: True,
) -> None:
    """Run main(settings, *words) on the command line; the one handler of errors. Ends the process.

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
            raise UserError(f"{len(given)} arguments beside the settings, expected {words[0]} or more: see --help")
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
