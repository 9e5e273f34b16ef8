"""Options of commands: each is a field of a dataclass, declared once with its type, default, bounds, choices and help.

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        epochs: int = option(20, "passes over the training images", low=1)

        def __post_init__(self) -> None:
            check(self)

`add_options` makes flags of the fields, `read` makes an instance of what was given. The type of a field is bool, int,
float, str or Path, a Literal of texts, one of these or None, or a tuple of them, which is written with commas.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from resnet import BadInput

OptionsT = TypeVar("OptionsT")

TRUTH = {"true": True, "1": True, "false": False, "0": False}
KINDS: Mapping[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
}
LARGEST = 2**31 - 1  # of any number, unless its option says otherwise: C libraries take 32 bits
SHOWN = 60  # characters of a value in a message
METAVARS: Mapping[type, str] = {bool: "", int: "N", float: "X", str: "TEXT", Path: "FILE"}


class Kind(NamedTuple):
    """What an option's value may be: a `type`, or a tuple of it, and if there are choices one of these."""

    type: type
    several: bool = False
    choices: tuple[str, ...] = ()


def option(
    default: Any,
    meaning: str,
    low: float = 0,
    high: float = LARGEST,
    choices: Sequence[str] = (),
    metavar: str = "",
    required: bool = False,
    positional: bool = False,
    group: str = "",
) -> Any:
    """Declare an option.

    Args:
        default: Its value where none is given; MISSING makes it a positional argument that must be given, unless
            `required` is set.
        meaning: Its help.
        low: The least value.
        high: The largest value.
        choices: All values that there are, where its type is no Literal; none allows any.
        metavar: What the help calls the value.
        required: With the default MISSING: a flag that must be given, in place of a positional argument.
        positional: With another default: a positional argument that may be left out, in place of a flag.
        group: Heading in the help, for this option and the following ones until the next heading.
    """
    metadata = {
        "help": meaning,
        "low": low,
        "high": high,
        "choices": tuple(choices),
        "metavar": metavar,
        "positional": positional or (default is MISSING and not required),
        "group": group,
    }
    return dataclasses.field(default=default, metadata=metadata)


def options(declared: type) -> tuple[dataclasses.Field[Any], ...]:
    """Return the fields of a dataclass that are options."""
    return tuple(field for field in dataclasses.fields(declared) if field.metadata)


def kinds(declared: type) -> dict[str, Kind]:
    """Return the types of a dataclass' options, by name."""
    hints = get_type_hints(declared)
    return {field.name: _find_kind(hints[field.name], field.metadata["choices"]) for field in options(declared)}


def check(instance: Any, name_of: Callable[[str], str] | None = None) -> None:
    """Hold the options of an instance against their bounds and choices.

    Args:
        instance: Of a dataclass with options.
        name_of: Returns what the user called a field; by default its flag.

    Raises:
        BadInput: A value is out of range.
    """
    found = kinds(type(instance))
    for field in options(type(instance)):
        name = name_of(field.name) if name_of else flag(field)
        value = getattr(instance, field.name)
        for item in value if isinstance(value, tuple) else (value,):
            _check_value(field, found[field.name].choices, item, name)


class CommandParser(argparse.ArgumentParser):
    """A parser of a command line whose errors are `BadInput`: one sentence, in place of the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise the error."""
        raise BadInput(f"{message}; `{self.prog} --help` shows the options")


class Number:
    """The `type` of an argument of argparse: a number within bounds, for parsers without a dataclass."""

    def __init__(self, kind: type[int] | type[float], low: float = 0, high: float = LARGEST) -> None:
        """Accept numbers from `low` to `high`."""
        self.kind, self.low, self.high = kind, low, high

    def __call__(self, text: str) -> Any:
        """Return the number; argparse names the argument in the error."""
        try:
            value = convert(text, Kind(self.kind), "")
            _check_bounds(value, self.low, self.high, "")
        except BadInput as error:
            raise argparse.ArgumentTypeError(str(error).lstrip()) from None
        return value


COUNT = Number(int, low=1)
AMOUNT = Number(float, low=1e-3)  # of seconds, or requests a second


def add_options(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup,
    declared: type,
    show_defaults: bool = True,
    layered: bool = False,
) -> None:
    """Add the flags of a dataclass' options; all values stay text, and absent ones None, until `read`.

    Args:
        parser: Where to add them.
        declared: The dataclass.
        show_defaults: Append defaults to the help.
        layered: The flags override values from elsewhere, like a file: no positional argument must be given, and each
            bool has a flag to turn it off.
    """
    found, group = kinds(declared), parser
    for field in options(declared):
        if field.metadata["group"]:
            group = parser.add_argument_group(field.metadata["group"])
        kind, meaning = found[field.name], field.metadata["help"].replace("%", "%%")
        shape: dict[str, Any] = {"metavar": _find_metavar(field, kind)}
        if kind.type is bool:
            negatable = layered or field.default
            shape = {"action": argparse.BooleanOptionalAction if negatable else "store_true", "default": None}
        if not field.metadata["positional"]:
            shape["dest"] = field.name
        positional, needed = field.metadata["positional"], field.default is MISSING
        if positional:
            shape |= {} if needed and not layered else {"nargs": "?"}
        elif needed:
            shape |= {"required": True}
        if show_defaults and not needed and kind.type is not bool:
            meaning += _show_default(field.default)
        group.add_argument(field.name if positional else flag(field), help=meaning, **shape)


def given(args: argparse.Namespace, declared: type) -> dict[str, Any]:
    """Return the values that were given as flags, by the names of their fields; an empty text may be a default.

    Raises:
        BadInput: A value is not of its option's type.
    """
    found = kinds(declared)
    return {
        field.name: convert(value, found[field.name], flag(field))
        for field in options(declared)
        if (value := getattr(args, field.name)) is not None and not value == field.default == ""
    }


def read(args: argparse.Namespace, declared: type[OptionsT]) -> OptionsT:
    """Return the options that were given as flags, with defaults for the others.

    Raises:
        BadInput: A value is not of its option's type or out of range, or one that must be given is missing.
    """
    found = given(args, declared)
    for field in options(declared):
        if field.default is MISSING and field.name not in found:
            raise BadInput(f"{flag(field)} is missing")
    return declared(**found)


def sort_keywords(keywords: Mapping[str, object], *declared: type) -> list[dict[str, Any]]:
    """Return the keywords of a function by the dataclass whose options they are, as the fields take them.

    Raises:
        BadInput: A keyword is no option of any, or its value is not of the option's type.
    """
    fields = {field.name: field for each in declared for field in options(each)}
    for name in keywords:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            raise BadInput(f"there is no option {name!r}" + (f"; do you mean {near[0]!r}?" if near else ""))
    found = {name: kind for each in declared for name, kind in kinds(each).items()}
    values = {
        name: convert(os.fspath(value) if isinstance(value, os.PathLike) else value, found[name], flag(fields[name]))
        for name, value in keywords.items()
        if value is not None
    }
    return [{field.name: values[field.name] for field in options(each) if field.name in values} for each in declared]


def convert(value: object, kind: Kind, name: str) -> Any:
    """Return a value as its field takes it; flags and environment variables give text, TOML files typed values.

    Args:
        value: As it was given.
        kind: The field's.
        name: What the user calls the option.

    Raises:
        BadInput: It is of another type.
    """
    if kind.several:
        items = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        return tuple(convert(item, kind._replace(several=False), name) for item in items)
    if isinstance(value, str):
        if value or kind.choices:  # `check` names the choices
            try:
                return TRUTH[value] if kind.type is bool else kind.type(value)
            except (KeyError, ValueError, OverflowError):
                pass
    elif type(value) is kind.type:
        return value
    elif kind.type is str and type(value) is int and not kind.choices:
        return str(value)
    elif kind.type is float and type(value) is int and abs(value) <= LARGEST:
        return float(value)
    elif kind.type is bool and isinstance(value, bool):
        return value
    raise BadInput(f"{name} must be {KINDS[kind.type]}, not {_show(value)}")


def flag(field: dataclasses.Field[Any]) -> str:
    """Return an option as the command line writes it; the field of a name that Python keeps to itself ends in `_`."""
    if field.metadata["positional"]:
        return field.metadata["metavar"] or field.name.upper()
    return f"--{field.name.rstrip('_').replace('_', '-')}"


def _check_value(field: dataclasses.Field[Any], choices: Sequence[str], value: Any, name: str) -> None:
    low, high = field.metadata["low"], field.metadata["high"]
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, int | float):
        _check_bounds(value, low, high, name)
    if choices and value not in choices:
        raise BadInput(f"{name} must be one of {', '.join(choices)}, not {_show(value)}")


def _check_bounds(value: float, low: float, high: float, name: str) -> None:
    if not low <= value <= high:  # true for NaN
        bounds = f"at least {low}" if high == LARGEST and value < low else f"from {low} to {high}"
        raise BadInput(f"{name} must be {bounds}, not {_show(value)}")


def _show(value: object) -> str:
    text = repr(value) if isinstance(value, str) else _print(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _print(value: object) -> str:
    try:
        return str(value)
    except ValueError:  # Python prints no numbers of more than 4,300 digits
        return "so large a number"


def _find_kind(hint: Any, choices: tuple[str, ...]) -> Kind:
    if get_origin(hint) is UnionType:
        (hint,) = [kind for kind in get_args(hint) if kind is not NoneType]
    if get_origin(hint) is Literal:
        return Kind(str, choices=get_args(hint))
    if get_origin(hint) is tuple:
        return _find_kind(get_args(hint)[0], choices)._replace(several=True)
    return Kind(hint, choices=choices)


def _find_metavar(field: dataclasses.Field[Any], kind: Kind) -> str:
    if field.metadata["metavar"]:
        return str(field.metadata["metavar"])
    if kind.choices:
        return f"{{{','.join(kind.choices)}}}"
    if field.metadata["positional"]:
        return field.name.upper()
    return f"{METAVARS[kind.type]},..." if kind.several else METAVARS[kind.type]


def _show_default(default: Any) -> str:
    if default is None or default in ("", ()):
        return ""
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    return f" (default: {shown:g})" if isinstance(shown, float) else f" (default: {shown})"
