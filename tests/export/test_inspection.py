"""Nothing undeclared: whatever is planted in a version is refused by export, `resnet verify` and server alike."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import onnx
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from onnx import TensorProto, helper

from export import attestation, graph, inspection, manifest, triton
from export.certificate import Budget
from export.manifest import TensorSpec
from export.parity import VariantError
from export.session import open_session
from export.verification import verify
from protos import onnx_pb2
from resnet import BadInput, CheckFailed
from serving.models import loader
from tests.versions import SIDE, make_graph, write_version

Tampering = Callable[[Path], object]
IMAGE = TensorSpec("image", "uint8", [-1, SIDE, SIDE, 3])
PROBABILITIES = TensorSpec("probabilities", "float32", [-1, 3])


@pytest.fixture
def small_network() -> None:
    """Nothing is trained here."""


@pytest.fixture
def version(tmp_path: Path) -> Path:
    """The folder of a version, with the files beside it that Triton reads."""
    folder = write_version(tmp_path / "models" / "colors" / "1")
    triton.write_files(manifest.read(folder), folder.parent)
    return folder


def add(name: str, content: bytes = b"x") -> Tampering:
    """Return a fault that is a further file of the version."""

    def plant(version: Path) -> None:
        (version / name).parent.mkdir(exist_ok=True)
        (version / name).write_bytes(content)

    return plant


def edit(change: Callable[[onnx.ModelProto], object]) -> Tampering:
    """Return a fault of the ONNX file."""

    def plant(version: Path) -> None:
        model = onnx.load(version / "model.onnx")
        change(model)
        (version / "model.onnx").write_bytes(model.SerializeToString())

    return plant


def move_out(tensor: TensorProto) -> TensorProto:
    """Take the values of a tensor from another file; return the tensor."""
    onnx.external_data_helper.set_external_data(tensor, "weights.bin")
    tensor.ClearField("raw_data")
    return tensor


def make_tensor(name: str = "elsewhere") -> TensorProto:
    """Return a tensor whose values are in another file."""
    return move_out(helper.make_tensor(name, TensorProto.FLOAT, [1], b"\0\0\0\0", raw=True))


def make_sparse(values: TensorProto, indices: TensorProto) -> onnx.SparseTensorProto:
    """Return a sparse tensor."""
    return onnx.SparseTensorProto(values=values, indices=indices, dims=[1])


def branch(model: onnx.ModelProto, inner: onnx.GraphProto) -> None:
    """Add a node whose branch has a branch with another graph."""
    empty = helper.make_graph([], "empty", [], [])
    outer = helper.make_graph(
        [helper.make_node("If", [""], [""], then_branch=inner, else_branch=empty)], "outer", [], []
    )
    model.graph.node.append(helper.make_node("If", [""], [""], then_branch=empty, else_branch=outer))


def set_attribute(model: onnx.ModelProto, **value: object) -> None:
    """Give a node an attribute of a type that `helper.make_node` may not guess."""
    model.graph.node[0].attribute.append(onnx.AttributeProto(name="value", **value))  # type: ignore[arg-type]


def add_domain(model: onnx.ModelProto, name: str) -> None:
    """Add an operator of a domain."""
    model.graph.node.append(helper.make_node("Run", [], [], domain=name))


def add_sparse(model: onnx.ModelProto) -> None:
    """Add a sparse constant with its indices elsewhere."""
    model.graph.sparse_initializer.append(make_sparse(helper.make_tensor("values", 1, [1], [1.0]), make_tensor()))


def define_operator(model: onnx.ModelProto) -> None:
    """Define what an operator of ONNX computes."""
    model.functions.append(helper.make_function("", "Softmax", ["x"], ["y"], [], [helper.make_opsetid("", 17)]))


def nest(content: bytes, depth: int) -> bytes:
    """Return a graph inside as many others; helpers of onnx would refuse to make it."""

    def wrap(field: int, content: bytes) -> bytes:
        size, digits = len(content), b""
        while size > 127:
            size, digits = size >> 7, digits + bytes([size & 127 | 128])
        return bytes([field << 3 | 2]) + digits + bytes([size]) + content

    for _ in range(depth):
        content = wrap(1, wrap(5, wrap(6, content)))
    return wrap(7, content)


FILES = {
    "a library of operators": "libops.so",
    "a library of Windows": "ops.dll",
    "a backend of Triton in the version": "libtriton_onnxruntime.so",
    "a script": "model.py",
    "a pickle": "model.pkl",
    "an engine of TensorRT": "model.plan",
    "a vocabulary": "assets/words.txt",
    "requests of TensorFlow Serving": "assets.extra/tf_serving_warmup_requests",
    "another SavedModel": "saved_model.pbtxt",
    "a variant without a certificate": "model.int4.onnx",
    "a hidden file": ".cache",
}
GRAPHS: dict[str, tuple[Tampering, str]] = {
    "weights elsewhere": (
        edit(lambda model: move_out(model.graph.initializer[0])),
        "keeps weights in other files: '.+'",
    ),
    "weights elsewhere, at no place": (
        edit(lambda model: setattr(model.graph.initializer[0], "data_location", TensorProto.EXTERNAL)),
        "keeps weights in other files: '.+'",
    ),
    "a place of weights alone": (
        edit(lambda model: model.graph.initializer[0].external_data.add(key="location", value="weights.bin")),
        "keeps weights in other files: '.+'",
    ),
    "a sparse constant elsewhere": (edit(add_sparse), "keeps weights in other files: 'elsewhere'"),
    "weights elsewhere in a node": (
        edit(lambda model: set_attribute(model, t=make_tensor())),
        "keeps weights in other files: 'elsewhere'",
    ),
    "weights elsewhere in a node with several": (
        edit(lambda model: set_attribute(model, tensors=[make_tensor(str(number)) for number in range(5)])),
        "keeps weights in other files: '0', '1', '2' and 2 more",
    ),
    "sparse weights elsewhere in a node": (
        edit(lambda model: set_attribute(model, sparse_tensor=make_sparse(make_tensor(), TensorProto()))),
        "keeps weights in other files: 'elsewhere'",
    ),
    "sparse weights elsewhere in a node with several": (
        edit(lambda model: set_attribute(model, sparse_tensors=[make_sparse(make_tensor(), TensorProto())])),
        "keeps weights in other files: 'elsewhere'",
    ),
    "weights elsewhere in a branch": (
        edit(lambda model: branch(model, helper.make_graph([], "inner", [], [], [make_tensor()]))),
        "keeps weights in other files: 'elsewhere'",
    ),
    "an operator of onnxruntime": (
        edit(lambda model: add_domain(model, "com.microsoft")),
        "has operators that are not of ONNX: 'com.microsoft.Run'",
    ),
    "an operator for other models": (
        edit(lambda model: add_domain(model, "ai.onnx.ml")),
        "has operators that are not of ONNX: 'ai.onnx.ml.Run'",
    ),
    "an operator of its maker in a branch": (
        edit(lambda model: branch(model, helper.make_graph([helper.make_node("Run", [], [], domain="x")], "", [], []))),
        "has operators that are not of ONNX: 'x.Run'",
    ),
    "an operator of its maker in one of several graphs": (
        edit(
            lambda model: set_attribute(
                model, graphs=[helper.make_graph([helper.make_node("Run", [], [], domain="x")], "", [], [])]
            )
        ),
        "has operators that are not of ONNX: 'x.Run'",
    ),
    "an operator that it defines": (edit(define_operator), "defines operators: 'Softmax'"),
    "a graph for training": (edit(lambda model: model.training_info.add()), "holds a graph for training"),
    "the format of onnxruntime": (
        edit(lambda model: setattr(model, "producer_name", "ORTM")),
        r"is not an ONNX file \(onnxruntime takes it for one of its own format\)",
    ),
    "no protocol buffer": (add("model.onnx", b"\xff" * 99), "is not an ONNX file"),
    "nothing": (add("model.onnx", b""), "takes nothing, its manifest says 'image'"),
    "a second input": (
        edit(lambda model: model.graph.input.append(helper.make_tensor_value_info("b", TensorProto.FLOAT16, None))),
        r"takes 'image' \(uint8 \[-1, .+\]\) and 'b' \(type 10 \[\]\), its manifest says 'image'",
    ),
    "no output": (edit(lambda model: model.graph.output.pop()), "returns nothing, its manifest says 'probabilities'"),
    "an output of another name": (
        edit(lambda model: setattr(model.graph.output[0], "name", "logits")),
        "returns 'logits' .+, its manifest says 'probabilities'",
    ),
    "an output of another type": (
        edit(lambda model: setattr(model.graph.output[0].type.tensor_type, "elem_type", TensorProto.UINT8)),
        r"returns 'probabilities' \(uint8 \[-1, 3\]\), its manifest says 'probabilities' \(float32 \[-1, 3\]\)",
    ),
    "a fixed batch axis": (
        edit(lambda model: setattr(model.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 1)),
        r"takes 'image' \(uint8 \[1, .+\]\), its manifest says 'image' \(uint8 \[-1, .+\]\)",
    ),
}


def exchange_for_link(name: str) -> Tampering:
    """Return a fault that moves a file or folder away, and leaves a link to it."""

    def plant(version: Path) -> None:
        (version / name).rename(version.parent / "elsewhere")
        (version / name).symlink_to(version.parent / "elsewhere")

    return plant


def link_folder(version: Path) -> None:
    """Add a link to a folder."""
    (version / "variables").symlink_to("/tmp")


BESIDE: dict[str, tuple[Tampering, str]] = {
    "a backend of Triton": (add("../libtriton_onnxruntime.so"), ".*so' is code that Triton would load, remove it"),
}
LATER: dict[str, tuple[Tampering, str]] = {
    "an added file": (add("words.txt"), ".*words.txt' was added after the export, remove it"),
    "an added hidden file": (add(".DS_Store"), ".*DS_Store' was added after the export, remove it"),
    "an added file in a hidden folder": (add(".idea/x"), ".*idea/x' was added after the export, remove it"),
    "a missing file": (lambda version: (version / "model.onnx").unlink(), ".*model.onnx is missing"),
    "a changed file": (add("model.onnx"), ".*model.onnx is not the file that was exported"),
    "a link in the place of a file": (exchange_for_link("model.onnx"), ".*model.onnx cannot be read"),
    "a link to a folder": (link_folder, ".*variables' is a link, which a version may not hold"),
    "a link in the place of the version": (exchange_for_link("."), ".*1 is a link, a version is a folder of its own"),
    "another configuration of Triton": (
        add("../config.pbtxt"),
        ".*config.pbtxt, which Triton reads, is not the file that was exported with this version",
    ),
    "other labels of Triton": (
        add("../labels.txt", b"blue\ngreen\nred\n"),
        ".*labels.txt, which Triton reads, is not the file that was exported with this version",
    ),
}
PLACELESS = {fault: (add(name), f".*{re.escape(name)}' has no place in a version") for fault, name in FILES.items()}
DECLARED = (
    PLACELESS | {fault: (plant, f".*model.onnx {message}") for fault, (plant, message) in GRAPHS.items()} | BESIDE
)


def declare(version: Path) -> None:
    """Have the manifest list the files that there are, as the maker of a version can."""
    msgspec.structs.replace(manifest.read(version), files=manifest.hash_files(version)).write(version)


def list_cases() -> list[object]:
    """Return each fault, with each gate that it can come to."""
    early = [pytest.param(fault, "export", marks=pytest.mark.slow) for fault in DECLARED]
    return [*early, *((fault, gate) for fault in (*DECLARED, *LATER) for gate in ("verify", "serve"))]


def export_with(plant: Tampering, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Export a small model whose conversion has a fault."""
    from export.export import export
    from tests.export.sources import classifier, make_source

    write = attestation.write_files

    def plant_first(recorded: manifest.Manifest, folder: Path) -> None:
        plant(folder)
        write(recorded, folder)

    monkeypatch.setattr(attestation, "write_files", plant_first)
    export(make_source(classifier()), target)


@pytest.mark.parametrize(("fault", "gate"), list_cases())
def test_a_fault_passes_no_gate(fault: str, gate: str, version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each names it in the same words; a maker who declares it in the manifest changes nothing."""
    plant, message = (DECLARED | LATER)[fault]
    if gate == "export":
        target = version.parent.with_name("other")
        with pytest.raises(CheckFailed, match=f"^nothing is published: {message}"):
            export_with(plant, target, monkeypatch)
        assert not [path for path in target.iterdir() if path.is_dir()]
        return
    plant(version)
    if fault in DECLARED:
        declare(version)
    if gate == "verify":
        with pytest.raises(CheckFailed, match=f"^{message}"):
            verify(version)
    else:
        with pytest.raises(BadInput, match=f"^{message}.*; restore the version, or export the model again$"):
            loader.read_checked(version)


@pytest.mark.slow
def test_a_variant_with_a_fault_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs only itself, and the next reduction is tried."""
    from export import precision
    from export.export import BUDGETS, export
    from tests.export.sources import classifier, make_source

    def write(source: Path, target: Path) -> None:
        model = onnx.load(source)
        model.training_info.add()
        onnx.save(model, target)

    reductions = [precision.Reduction("first", write), precision.Reduction("second", shutil.copy)]
    monkeypatch.setattr(precision, "list_reductions", lambda *_: reductions)
    budgets = BUDGETS | {"fp16": Budget(accuracy_drop=0.5, evidence="point")}
    version = export(make_source(classifier()), tmp_path / "models" / "colors", ["fp16"], budgets)
    assert manifest.read(version).certificate.variants[-1].method == "second"
    del reductions[1:]
    with pytest.raises(VariantError, match="is published without fp16: onnx-fp16 holds a graph for training$"):
        export(make_source(classifier()), version.parent, ["fp16"], budgets)
    assert loader.read_checked(version.with_name("2")).certificate.find("onnx-fp16") is None


def test_what_an_export_writes_passes(version: Path) -> None:
    """Also what other exports have, empty folders, and what users put beside the versions."""
    for name in ("variables/variables.index", "variables/variables.data-00000-of-00001", "fingerprint.pb"):
        add(name)(version)
    for name in ("model.keras", "check.py", "test-result.intoto.json"):
        add(name)(version)
    add("labels.txt", b"red\ngreen\nblue\n")(version)
    declare(version)
    (version / "assets").mkdir()
    (version.parent / "README.md").touch()
    (version.parent / "stable").symlink_to("1")
    assert not list(inspection.find_problems(version, manifest.read(version)))
    for path in triton.list_paths(version.parent):
        path.unlink()
    assert not list(inspection.find_problems(version, manifest.read(version)))


def test_the_class_names_are_those_of_the_manifest(version: Path) -> None:
    """Else a version would answer another class than the one that its training knew."""
    add("labels.txt", b"blue\ngreen\nred\n")(version)
    declare(version)
    (problem,) = inspection.find_problems(version, manifest.read(version))
    assert problem == f"{version}/labels.txt has other class names than the manifest"


@pytest.mark.parametrize("name", ["model.sig", "manifest.sig"])
def test_a_signature_is_a_file(name: str, version: Path) -> None:
    """Also where nobody checks it."""
    (version / name).mkdir()
    (problem,) = inspection.find_problems(version, manifest.read(version))
    assert problem == f"{version}/{name} is not a file"


def test_every_fault_is_named(version: Path) -> None:
    """One clause for each; ONNX files are read only if they are those that the manifest names."""
    add("a.so")(version)
    edit(define_operator)(version)
    declare(version)
    (version / "b.so").touch()
    assert list(inspection.find_problems(version, manifest.read(version))) == [
        f"'{version}/b.so' was added after the export, remove it",
        f"'{version}/a.so' has no place in a version",
    ]
    for name in ("a.so", "b.so"):
        (version / name).unlink()
    edit(lambda model: model.training_info.add())(version)
    declare(version)
    assert list(inspection.find_problems(version, manifest.read(version))) == [
        f"{version}/model.onnx defines operators: 'Softmax'",
        f"{version}/model.onnx holds a graph for training",
    ]


def test_every_onnx_file_of_a_version_is_read(version: Path) -> None:
    """Not only the one that is served."""
    recorded = manifest.read(version)
    onnx_variant = recorded.certificate.variants[0]
    recorded.certificate.variants.append(
        msgspec.structs.replace(onnx_variant, name="onnx-fp16", path="model.fp16.onnx")
    )
    shutil.copy(version / "model.onnx", version / "model.fp16.onnx")
    recorded.write(version)
    declare(version)
    assert not list(inspection.find_problems(version, manifest.read(version)))
    model = make_graph()
    define_operator(model)
    (version / "model.fp16.onnx").write_bytes(model.SerializeToString())
    declare(version)
    (problem,) = inspection.find_problems(version, manifest.read(version))
    assert problem == f"{version}/model.fp16.onnx defines operators: 'Softmax'"


def test_domains_that_are_imported_only_do_no_harm() -> None:
    """The quantizer of onnxruntime imports all it knows; `ai.onnx` is another name of ONNX itself."""
    model = make_graph()
    model.opset_import.extend(helper.make_opsetid(name, 1) for name in ("com.microsoft", "org.pytorch.aten"))
    model.graph.node[0].domain = "ai.onnx"
    assert not list(graph.find_faults(model.SerializeToString(), IMAGE, PROBABILITIES))


@pytest.mark.parametrize("depth", [20, 50, 5_000])
def test_graphs_in_graphs_are_read_or_refused(depth: int) -> None:
    """However deep they are, there is an answer."""
    inner = helper.make_graph([], "inner", [], [], [make_tensor()]).SerializeToString()
    faults = list(graph.find_faults(nest(inner, depth), IMAGE, PROBABILITIES))
    assert any("is not an ONNX file" in fault or "keeps weights in other files" in fault for fault in faults)


def test_the_fields_are_those_of_onnx() -> None:
    """Name, number, type and kind; an enumeration may be an integer."""
    compared = []

    def compare(ours: Descriptor, theirs: Descriptor) -> None:
        compared.append(ours.name)
        for field in ours.fields:
            other = theirs.fields_by_name[field.name]
            assert (field.number, field.is_repeated) == (other.number, other.is_repeated)
            assert field.type == other.type or (field.type, other.type) == (
                FieldDescriptor.TYPE_INT32,
                FieldDescriptor.TYPE_ENUM,
            )
            if field.message_type is not None and field.message_type.name not in compared:
                compare(field.message_type, other.message_type)

    compare(onnx_pb2.ModelProto.DESCRIPTOR, onnx.ModelProto.DESCRIPTOR)
    assert set(compared) >= set(onnx_pb2.DESCRIPTOR.message_types_by_name)


def test_a_session_reads_no_weights_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even if nobody inspected the file: no hash would cover them."""
    model = make_graph()
    (tmp_path / "weights.bin").write_bytes(model.graph.initializer[0].raw_data)
    move_out(model.graph.initializer[0])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match="External data"):
        open_session(model.SerializeToString())
