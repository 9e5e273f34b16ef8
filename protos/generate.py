"""Generate the Python code of the wire contract in place: `python -m protos.generate`, from the repository's root.

protoc runs from the root so that the generated imports are correct. The code is committed, so that an installation
needs no compiler; CI runs this module and fails if a file changes.
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
    for path in sorted((root / "protos").glob("*_pb2.py")):  # protoc supports the default pool only
        text = path.read_text("utf-8").replace(
            "from google.protobuf import descriptor_pool as _descriptor_pool\n", "import protos as _protos\n"
        )
        path.write_text(text.replace("_descriptor_pool.Default()", "_protos.POOL"), "utf-8")
    for source in sources:  # a format has no services
        if "\nservice " not in (root / source).read_text("utf-8"):
            for path in (root / "protos").glob(f"{Path(source).stem}_pb2_grpc.py*"):
                path.unlink()
    return code


if __name__ == "__main__":
    sys.exit(generate(Path.cwd()))
