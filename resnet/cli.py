"""The `resnet` command: one subcommand per stage of the pipeline, each imported only when it is used.

A stage that meets bad input raises `BadInput`, a stage whose check fails raises `CheckFailed`; both reach the
user as one sentence, with the exit codes 2 and 1. Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from resnet import BadInput, CheckFailed


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
    "classify": Command("serving.commands.classify", "serving", "classify image files through a running server"),
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
    return f"usage: resnet COMMAND [options]\n\n{rows}\n\nresnet COMMAND --help shows the options of a command."


def set_variables() -> None:
    """Set the environment variables of libraries, which read them when they are imported; those that are set stay."""
    for variable, value in VARIABLES.items():
        os.environ.setdefault(variable, value)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for a check that failed, 2 for bad input, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"resnet: there is no command {name!r}; choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    set_variables()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a label that the terminal cannot show is escaped
            stream.reconfigure(errors="backslashreplace")
    command = COMMANDS[name]

    def run() -> None:
        module = importlib.import_module(command.module)
        parser = argparse.ArgumentParser(
            prog=f"resnet {name}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.configure(parser)
        module.run(parser.parse_args(rest))

    return call(run, f"resnet {name}", command.extra)


def call(action: Callable[[], object], name: str, extra: str = "all") -> int:
    """Call a function, print an expected error as one sentence, and return the exit code as `main` does.

    Args:
        action: Does what a command or script is for.
        name: What the user called; it begins the sentence.
        extra: The extra of this package that installs what the command needs.
    """
    try:
        action()
    except BadInput as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except CheckFailed as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in PACKAGES:
            raise
        print(f"{name}: {error.name} is not installed; install resnet with its extra {extra!r}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder without permissions: a traceback would not help
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return 130
    return 0
