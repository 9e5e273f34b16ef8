"""Every number of every command: what is out of range is one sentence, before any work."""

from __future__ import annotations

import argparse
import importlib
import inspect
import math
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import pytest

from resnet import BadInput, cli
from resnet.options import LARGEST, CommandParser, Number, add_options, check, flag, kinds, option, options, read
from serving.config import Config

# A whole number of 10**31 does not fit a C library, and 1e308 times anything is infinite.
WRONG = ("nan", "inf", "-inf", "-1e308", "1e308", str(10**31), "-" + str(10**31), "9" * 5000, "", "x", "0x10")


def make_parser(name: str) -> CommandParser:
    """Return the parser of a command."""
    parser = CommandParser(prog=f"resnet {name}")
    importlib.import_module(cli.COMMANDS[name].module).configure(parser)
    return parser


def list_declared(name: str) -> Iterator[type]:
    """Yield the dataclasses with options that a command's module names."""
    module = importlib.import_module(cli.COMMANDS[name].module)
    for declared in (*vars(module).values(), *([Config] if name == "serve" else [])):
        if inspect.isclass(declared) and hasattr(declared, "__dataclass_fields__") and options(declared):
            yield declared


def list_numbers(name: str) -> list[str]:
    """Return the flags of a command that take numbers."""
    known = {word for action in make_parser(name)._actions for word in action.option_strings}
    numbers = {
        flag(field)
        for declared in list_declared(name)
        for field in options(declared)
        if kinds(declared)[field.name].type in (int, float)
    }
    return sorted(known & numbers)


DECLARED = {declared.__name__: declared for name in cli.COMMANDS for declared in list_declared(name)}
NUMBERS = [(name, number) for name in cli.COMMANDS for number in list_numbers(name)]


def list_actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the arguments of a parser, and of its verbs."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from list_actions(verb)
        else:
            yield action


def find_required(name: str) -> list[str]:
    """Return arguments for all that a command requires."""
    words = []
    for action in make_parser(name)._actions:
        if action.required or not action.option_strings:
            words += [f"{action.option_strings[0]}=1"] if action.option_strings else ["1"]
    return words


def test_the_numbers_are_found() -> None:
    """The tests below are about these."""
    assert len(NUMBERS) > 60
    commands = {
        "train",
        "degradation",
        "export",
        "verify",
        "serve",
        "tune",
        "rollout",
        "classify",
        "predict",
        "load",
        "bench",
        "demo",
    }
    assert {name for name, _ in NUMBERS} == commands


@pytest.mark.parametrize("declared", DECLARED.values(), ids=DECLARED)
def test_every_number_has_bounds(declared: type) -> None:
    """No option takes all that there is, and its default is within."""
    for field in options(declared):
        low, high = field.metadata["low"], field.metadata["high"]
        assert -math.inf < low <= high < math.inf, field.name
        if kinds(declared)[field.name].type in (int, float) and field.default is not MISSING:
            items = field.default if isinstance(field.default, tuple) else (field.default,)
            assert all(item is None or low <= item <= high for item in items), field.name


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_no_argument_is_a_number_without_bounds(name: str) -> None:
    """Whatever is declared to argparse itself is a text, a path or a `Number`."""
    for action in list_actions(make_parser(name)):
        assert action.type in (None, Path) or isinstance(action.type, Number), action.dest


@pytest.mark.parametrize(("name", "option"), NUMBERS)
def test_a_number_out_of_range_is_one_sentence(
    name: str, option: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2, and the sentence names the option."""
    monkeypatch.chdir(tmp_path)
    required = find_required(name)
    for value in WRONG:
        assert cli.main([name, *required, f"{option}={value}"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"resnet {name}: {option} must be "), error
        assert len(error.splitlines()) == 1
        assert len(error) < 400
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        "models prune m --keep",
        "models show m --version",
        "models label m stable",
        "degradation --out x --depths 20",
    ],
)
@pytest.mark.parametrize("value", [*WRONG, "0", "-1"])
def test_a_number_of_argparse_is_one_sentence_too(
    arguments: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of verbs, and where several are given."""
    assert cli.main([*arguments.split(), value]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("rate", [*WRONG, "0", "-5", "1,nan", "5000001", "1000000"])
def test_a_rate_is_a_number_that_can_be_sent(rate: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A measurement has so many requests that their record fits into memory."""
    assert cli.main(["load", "127.0.0.1:1", f"--rate={rate}"]) == 2
    error = capsys.readouterr().err
    assert "--rate" in error
    assert len(error.splitlines()) == 1


@dataclass(frozen=True, kw_only=True)
class BoundedOptions:
    """An option of each kind that has bounds."""

    count: int = option(1, "a number")
    share: float = option(0.5, "a share", low=0, high=1)
    sizes: tuple[int, ...] = option((1,), "sizes", low=1)

    def __post_init__(self) -> None:
        check(self)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count=-1"], "--count must be at least 0, not -1"),
        ([f"--count={LARGEST + 1}"], f"--count must be from 0 to {LARGEST}, not {LARGEST + 1}"),
        (["--share=nan"], "--share must be from 0 to 1, not nan"),
        (["--share=1e308"], "--share must be from 0 to 1, not 1e\\+308"),
        (["--sizes=1,0"], "--sizes must be at least 1, not 0"),
        (["--count=" + "9" * 5000], "--count must be a whole number, not '9{59}\\.\\.\\."),
        (["--colour=red"], "unrecognized arguments: --colour=red; `toy --help` shows the options"),
    ],
)
def test_the_sentence_names_the_bounds(arguments: list[str], message: str) -> None:
    """A number without bounds of its own is at least 0 and fits 32 bits."""
    parser = CommandParser(prog="toy")
    add_options(parser, BoundedOptions)
    with pytest.raises(BadInput, match=message):
        read(parser.parse_args(arguments), BoundedOptions)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**30, -1, pytest.param(10**5000, id="huge")])
def test_values_that_were_never_text_are_checked_too(value: Any) -> None:
    """As those of a TOML file, or of Python."""
    with pytest.raises(BadInput, match="--count must be"):
        BoundedOptions(count=value)
