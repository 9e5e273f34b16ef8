"""Generate the Python code of the wire contract in place: `python -m protos.generate`, from the repository's root.

Running protoc from the root makes the generated imports right as they are. The code is committed, so that an install
needs no compiler; CI runs this and fails when it changes a file.
"""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

OUTPUTS = ("--python_out=.", "--mypy_out=quiet:.", "--grpc_python_out=.", "--mypy_grpc_out=quiet:.")


def generate(root: Path) -> int:
    """Compile every .proto file of `root/protos`; return protoc's exit code."""
    sources = sorted(path.relative_to(root).as_posix() for path in (root / "protos").glob("*.proto"))
    code = int(protoc.main(["protoc", "-I.", f"-I{files('grpc_tools') / '_proto'}", *OUTPUTS, *sources]))
    for path in sorted((root / "protos").glob("*_pb2.py")):  # protoc knows no pool but the default
        text = path.read_text("utf-8").replace(
            "from google.protobuf import descriptor_pool as _descriptor_pool\n", "import protos as _protos\n"
        )
        path.write_text(text.replace("_descriptor_pool.Default()", "_protos.POOL"), "utf-8")
    return code


if __name__ == "__main__":
    sys.exit(generate(Path.cwd()))
