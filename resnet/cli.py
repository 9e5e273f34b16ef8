"""The `resnet` command: one subcommand per stage of the pipeline, each imported only when it is used.

A stage that meets bad input raises `BadInput`, a stage whose check fails raises `CheckFailed`; both reach the
user as one sentence, with the exit codes 2 and 1. Anything else is a bug: its sentence names the file with the
traceback, and the exit code is 70. `--debug` prints the traceback of any of them.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import NamedTuple

from resnet import BadInput, CheckFailed
from resnet.options import CommandParser

DEBUG = "--debug"
BUG, PIPE_CLOSED, INTERRUPTED = 70, 141, 130  # exit codes: EX_SOFTWARE, and 128 + the number of the signal


class Command(NamedTuple):
    """A subcommand: the module that defines its `configure(parser)` and `run(args)`, its extra, and a line of help."""

    module: str
    extra: str
    summary: str


PACKAGES = ("resnet", "training", "export", "serving", "protos", "benchmarks")

COMMANDS = {
    "train": Command("training.commands.train", "training", "train a ResNet image classifier"),
    "family": Command("training.commands.family", "training", "list the networks and their numbers of parameters"),
    "degradation": Command(
        "training.commands.degradation", "training", "show that without shortcuts deeper networks get worse"
    ),
    "export": Command(
        "export.commands.export", "export", "convert a model to ONNX and SavedModel, check it, and publish it"
    ),
    "verify": Command("export.commands.verify", "export", "check that an exported model is unchanged and correct"),
    "models": Command("export.commands.models", "export", "list, show, label, verify and prune model versions"),
    "serve": Command("serving.commands.serve", "serving", "serve models over gRPC"),
    "tune": Command("serving.commands.tune", "serving", "find the fastest threads and runtime for a model on this CPU"),
    "status": Command("serving.commands.status", "serving", "show what a server runs, how fast, and its rollouts"),
    "rollout": Command("serving.commands.rollout", "serving", "give a new version a growing share of the requests"),
    "classify": Command("serving.commands.classify", "serving", "classify image files through a running server"),
    "predict": Command("serving.commands.predict", "serving", "classify many images without a server, into one file"),
    "load": Command("benchmarks.load.command", "load", "measure the latency and throughput of a server under load"),
    "bench": Command("benchmarks.bench.command", "all", "compare a served model with its Keras original"),
    "demo": Command("benchmarks.demo", "all", "train, export, serve and measure on handwritten digits"),
}

VARIABLES = {
    "GRPC_VERBOSITY": "NONE",  # its C library would print lines of its own; the errors of calls say the same
    "TF_CPP_MIN_LOG_LEVEL": "2",  # hides TensorFlow's start-up messages
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime would send usage data to Microsoft, with an id of the device
}


def usage() -> str:
    """Return the text of `resnet --help`."""
    rows = "\n".join(f"  {name:<13}{command.summary}" for name, command in COMMANDS.items())
    hints = f"resnet COMMAND --help shows the options of a command, {DEBUG} the traceback of an error."
    return f"usage: resnet COMMAND [options]\n\n{rows}\n\n{hints}"


def set_variables() -> None:
    """Set the environment variables of libraries, which read them when they are imported; those that are set stay."""
    for variable, value in VARIABLES.items():
        os.environ.setdefault(variable, value)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0, 1 for a check that failed, 2 for bad input, 70 for a bug, 130 for Ctrl-C, 141 if nobody reads the output.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = [argument for argument in given if argument != DEBUG]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a name that the terminal cannot show is no error
            stream.reconfigure(errors="backslashreplace")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"resnet: there is no command {name!r}; choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    set_variables()
    command = COMMANDS[name]

    def run() -> None:
        module = importlib.import_module(command.module)
        parser = CommandParser(
            prog=f"resnet {name}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.configure(parser)
        module.run(parser.parse_args(rest))

    return call(run, f"resnet {name}", command.extra, debug=arguments != given)


def call(action: Callable[[], object], name: str, extra: str = "all", debug: bool = False) -> int:
    """Call a function, print an error as one sentence, and return the exit code as `main` does.

    Args:
        action: Does what a command or script is for.
        name: What the user called; it begins the sentence.
        extra: The extra of this package that installs what the command needs.
        debug: Print the traceback of an error, too.
    """
    try:
        action()
        sys.stdout.flush()
    except KeyboardInterrupt:
        _say(f"\n{name}: interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # as in `resnet models list models | head`
        _drop_output()
        return PIPE_CLOSED
    except Exception as error:
        if isinstance(error, OSError):
            _drop_output()  # it may be the output that could not be written
        if debug:
            _say(traceback.format_exc())
        sentence, code = _explain(error, extra)
        _say(f"{name}: {sentence}")
        return code
    return 0


def _explain(error: Exception, extra: str) -> tuple[str, int]:
    """Return what to tell the user of an error, and the exit code."""
    match error:
        case BadInput():
            return str(error), 2
        case CheckFailed():
            return str(error), 1
        case ModuleNotFoundError(name=str(module)) if module.partition(".")[0] not in PACKAGES:
            return f"{module} is not installed; install resnet with its extra {extra!r}", 2
        case OSError(errno=errno.ENOSPC):
            return f"{error.strerror}; free some, or write to another place", 2
        case OSError():  # a folder without permissions: a traceback would not help
            return f"{os.fsdecode(error.filename)}: {error.strerror}" if error.filename else str(error), 2
        case MemoryError():
            return "there is not enough memory; smaller images, batches or numbers need less", 2
    first = (str(error).strip().splitlines() or [""])[0]
    return f"this is a bug ({type(error).__name__}: {first}); {_save_traceback()}", BUG


def _save_traceback() -> str:
    """Return where the traceback is, and what to do with it."""
    try:
        descriptor, path = tempfile.mkstemp(".txt", "resnet-traceback-")  # for the user's eyes only
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            traceback.print_exc(file=file)
    except OSError:
        return f"please report it in the project's issue tracker, with the traceback that {DEBUG} shows"
    return f"please report it in the project's issue tracker, with {path}"


def _say(text: str) -> None:
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _drop_output() -> None:
    """Have what is left of the output written to nowhere, if it cannot be written where it should."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError), Path(os.devnull).open("wb") as null:
            os.dup2(null.fileno(), sys.stdout.fileno())
