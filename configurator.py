"""Settings from a config file and --key=value onto one typed dataclass.

    python train.py config/prune.py --max_steps=100 --domains=python,wiki --resume

A config file is plain Python assignments, run in a namespace of its own; names that start with an underscore are its
own business. Every other name and every type is checked against the dataclass; later settings win.
"""

import difflib
import runpy
import typing
from dataclasses import fields
from pathlib import Path


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
    try:
        names = runpy.run_path(path)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{path}: cannot be run: {type(error).__name__}: {error}") from error
    settings = {name: value for name, value in names.items() if not name.startswith("_")}
    for name, value in settings.items():
        _known(name, hints, path)
        settings[name] = _typed(name, value, hints[name], path)
    return settings


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
            raise ConfigError(f"{where}: {name} must be a tuple of {item.__name__}, is {value!r}")
        return tuple(_typed(name, v, item, where) for v in value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{where}: {name} must be {kind.__name__}, is {type(value).__name__} {value!r}")
    return value


def described(config) -> str:
    """One line a setting, those that differ from their default marked."""
    return "\n".join(
        f"  {'*' if getattr(config, f.name) != f.default else ' '} {f.name} = {getattr(config, f.name)!r}"
        for f in fields(config)
    )
