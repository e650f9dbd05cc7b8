"""The record of one adapter: files, tensors, base, where it came from (SPEC.md section 4)."""

from collections.abc import Mapping, Sized
from dataclasses import dataclass, field, replace

from loraforge_registry import canonical
from loraforge_registry.canonical import Value
from loraforge_registry.digest import Digest
from loraforge_registry.errors import ManifestError
from loraforge_registry.fields import check_schema, integer, keys, mapping, raw_digest, typed
from loraforge_registry.header import TensorEntry

SCHEMA = "loraforge.adapter/1"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
README_FILE = "README.md"
RECORD_FILE = "loraforge.json"  # what a repository on a hub says of the artifact or tree at its root
FILES = (CONFIG_FILE, WEIGHTS_FILE, README_FILE)

MAX_INPUTS = 10_000  # of one operation: each may be an artifact that every walk of the lineage looks for


@dataclass(frozen=True, slots=True)
class File:
    """One stored file."""

    path: str
    digest: Digest
    size: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the weights file, and the BLAKE3 digest of its raw bytes."""

    entry: TensorEntry
    digest: Digest


@dataclass(frozen=True, slots=True)
class Artifact:
    """An adapter in a store, named both ways: exactly these files, and this function."""

    digest: Digest
    content_id: Digest


@dataclass(frozen=True, slots=True)
class Input:
    """One input of an operation, with its weight.

    The source is an artifact, the content id of an adapter that was in no store, or a value that was itself derived
    and never stored.
    """

    source: "Artifact | Digest | Derivation"
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Derivation:
    """How an adapter was made from others; ``version`` rises when equal inputs would give another result."""

    operation: str
    version: int
    inputs: tuple[Input, ...]
    parameters: Mapping[str, Value] = field(default_factory=dict)

    def artifacts(self) -> tuple[Digest, ...]:
        """The artifacts this was made from, through values that were never stored; each once, in order."""
        found: dict[Digest, None] = {}
        for item in self.inputs:
            if isinstance(item.source, Artifact):
                found[item.source.digest] = None
            elif isinstance(item.source, Derivation):
                found |= dict.fromkeys(item.source.artifacts())
        return tuple(found)

    @property
    def parent(self) -> Artifact | None:
        """The artifact that this was made atop: the first input that computes what the parameter ``parent`` says."""
        said = self.parameters.get("parent")
        made_from = (item.source for item in self.inputs if isinstance(item.source, Artifact))
        return next((source for source in made_from if str(source.content_id) == said), None)

    def located(self, stored: "Mapping[Digest, Artifact]") -> "Derivation":
        """Return the same derivation with inputs that were known by content id only named by their artifact."""

        def locate(source: "Artifact | Digest | Derivation") -> "Artifact | Digest | Derivation":
            if isinstance(source, Derivation):
                return source.located(stored)
            return stored.get(source, source) if isinstance(source, Digest) else source

        return replace(self, inputs=tuple(replace(item, source=locate(item.source)) for item in self.inputs))


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is stored under an artifact digest."""

    content_id: Digest
    files: tuple[File, ...]
    tensors: tuple[Tensor, ...]
    base_name: str | None = None
    base_revision: str | None = None
    derivation: Derivation | None = None
    report: Mapping[str, Value] | None = None

    def file(self, path: str) -> File:
        """The file at ``path``, which must be one that every adapter has."""
        return next(file for file in self.files if file.path == path)

    @property
    def blobs(self) -> Mapping[Digest, int]:
        """The sizes of its files, by digest."""
        return {file.digest: file.size for file in self.files}

    @property
    def needs(self) -> tuple[Digest, ...]:
        """No record must be there for an adapter to be whole."""
        return ()

    @property
    def lineage(self) -> tuple[Digest, ...]:
        """The artifacts it was made from, which are kept as far as they are there."""
        return () if self.derivation is None else self.derivation.artifacts()

    @property
    def parent(self) -> Digest | None:
        """The artifact that it was made atop, if any."""
        found = None if self.derivation is None else self.derivation.parent
        return None if found is None else found.digest

    @property
    def size(self) -> int:
        """The bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def parameters(self) -> int:
        """The number of elements of all tensors."""
        return sum(tensor.entry.elements for tensor in self.tensors)


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the canonical bytes; ``decode_manifest(encode_manifest(m)) == m``."""
    return canonical.encode(
        {
            "schema": SCHEMA,
            "base": {"name": manifest.base_name, "revision": manifest.base_revision},
            "content_id": manifest.content_id.raw,
            "derivation": None if manifest.derivation is None else _derivation_out(manifest.derivation),
            "files": [{"path": f.path, "digest": f.digest.raw, "size": f.size} for f in manifest.files],
            "report": None if manifest.report is None else dict(manifest.report),
            "tensors": [_tensor_out(tensor) for tensor in manifest.tensors],
        }
    )


def decode_manifest(data: bytes) -> Manifest:
    """Read a manifest.

    Raises:
        ManifestError: not canonical, a field missing, unknown or of a wrong type, or a newer schema.
    """
    return manifest_of(typed("manifest", canonical.decode(data), dict))


def manifest_of(fields: dict[str, Value]) -> Manifest:
    """Read a manifest that was unpacked (``decode_manifest``)."""
    check_schema(fields.get("schema"), SCHEMA)
    keys("manifest", fields, "schema base content_id derivation files report tensors")
    base = mapping("base", fields["base"], "name revision")
    derivation, report = fields["derivation"], fields["report"]
    manifest = Manifest(
        content_id=raw_digest("sha256", fields["content_id"]),
        files=tuple(_file(item) for item in typed("files", fields["files"], list)),
        tensors=tuple(_tensor(item) for item in typed("tensors", fields["tensors"], list)),
        base_name=None if base["name"] is None else typed("base.name", base["name"], str),
        base_revision=None if base["revision"] is None else typed("base.revision", base["revision"], str),
        derivation=None if derivation is None else _derivation(derivation),
        report=None if report is None else _report(report),
    )
    _check_order(manifest)
    return manifest


def derivation_as_json(derivation: Derivation) -> dict[str, object]:
    """The same record with digests spelt out, for ``--json``."""
    inputs: list[dict[str, object]] = []
    for item in derivation.inputs:
        source: dict[str, object]
        if isinstance(item.source, Artifact):
            source = {"digest": str(item.source.digest), "content_id": str(item.source.content_id)}
        elif isinstance(item.source, Digest):
            source = {"content_id": str(item.source)}
        else:
            source = {"derivation": derivation_as_json(item.source)}
        inputs.append({"weight": item.weight, **source})
    return {
        "operation": derivation.operation,
        "version": derivation.version,
        "parameters": dict(derivation.parameters),
        "inputs": inputs,
    }


def _derivation_out(derivation: Derivation) -> Value:
    _check_inputs(derivation.inputs)
    return {
        "operation": derivation.operation,
        "version": derivation.version,
        "parameters": dict(derivation.parameters),
        "inputs": [_input_out(item) for item in derivation.inputs],
    }


def _input_out(item: Input) -> Value:
    source: dict[str, Value]
    if isinstance(item.source, Artifact):
        source = {"artifact": {"digest": item.source.digest.raw, "content_id": item.source.content_id.raw}}
    elif isinstance(item.source, Digest):
        source = {"content_id": item.source.raw}
    else:
        source = {"derivation": _derivation_out(item.source)}
    return {"weight": float(item.weight), **source}


def _tensor_out(tensor: Tensor) -> Value:
    entry = tensor.entry
    return [entry.name, entry.dtype, list(entry.shape), entry.begin, entry.end, tensor.digest.raw]


def _derivation(value: Value) -> Derivation:
    fields = mapping("derivation", value, "operation version parameters inputs")
    _check_inputs(typed("inputs", fields["inputs"], list))
    return Derivation(
        operation=typed("operation", fields["operation"], str),
        version=integer("version", fields["version"]),
        inputs=tuple(_input(item) for item in typed("inputs", fields["inputs"], list)),
        parameters=_parameters(fields["parameters"]),
    )


def _check_inputs(inputs: Sized) -> None:
    if len(inputs) > MAX_INPUTS:
        raise ManifestError(f"an operation on {len(inputs)} inputs; the limit is {MAX_INPUTS}")


def _input(value: Value) -> Input:
    fields = typed("input", value, dict)
    kind = next(iter(set(fields) - {"weight"}), "")
    if set(fields) not in ({"weight", "artifact"}, {"weight", "content_id"}, {"weight", "derivation"}):
        raise ManifestError(f"input: the fields {sorted(fields)} are not a weight and one source")
    source: Artifact | Digest | Derivation
    if kind == "artifact":
        both = mapping("artifact", fields[kind], "digest content_id")
        source = Artifact(raw_digest("sha256", both["digest"]), raw_digest("sha256", both["content_id"]))
    elif kind == "content_id":
        source = raw_digest("sha256", fields[kind])
    else:
        source = _derivation(fields[kind])
    return Input(source, typed("weight", fields["weight"], float))


def _file(value: Value) -> File:
    fields = mapping("file", value, "path digest size")
    path = typed("path", fields["path"], str)
    if path not in FILES:
        raise ManifestError(f"file path {path[:80]!r}; expected one of {', '.join(FILES)}")
    return File(path, raw_digest("sha256", fields["digest"]), integer("size", fields["size"]))


def _tensor(value: Value) -> Tensor:
    row = typed("tensor", value, list)
    if len(row) != 6:
        raise ManifestError(f"a tensor of {len(row)} fields, expected 6")
    name, dtype, shape, begin, end, digest = row
    entry = TensorEntry(
        name=typed("tensor name", name, str),
        dtype=typed("dtype", dtype, str),
        shape=tuple(integer("shape", item) for item in typed("shape", shape, list)),
        begin=integer("begin", begin),
        end=integer("end", end),
    )
    return Tensor(entry, raw_digest("blake3", digest))


def _report(value: Value) -> dict[str, Value]:
    """Numbers and texts, and under ``targets`` such a map for each target; an ``error`` is a float."""
    fields: dict[str, Value] = dict(typed("report", value, dict))
    targets = typed("report.targets", fields.pop("targets", {}), dict)
    rows = [_scalars(f"report of {name[:80]!r}", row) for name, row in targets.items()]
    for row in (_scalars("report", fields), *rows):
        typed("report error", row.get("error", 0.0), float)
    return typed("report", value, dict)


def _parameters(value: Value) -> dict[str, Value]:
    """Scalars, and arrays of them."""
    fields: dict[str, Value] = typed("parameters", value, dict)
    for key, item in fields.items():
        for each in item if isinstance(item, list) else [item]:
            _scalars("parameters", {key: each})
    return fields


def _scalars(what: str, value: Value) -> dict[str, Value]:
    fields: dict[str, Value] = typed(what, value, dict)
    for key, item in fields.items():
        if isinstance(item, bytes | list | dict):
            raise ManifestError(f"{what}: {key[:80]!r} is {type(item).__name__}, expected a number, text, bool or nil")
    return fields


def _check_order(manifest: Manifest) -> None:
    paths = [file.path for file in manifest.files]
    names = [tensor.entry.name for tensor in manifest.tensors]
    if paths != sorted(set(paths)) or not {CONFIG_FILE, WEIGHTS_FILE} <= set(paths):
        raise ManifestError(f"files {paths}: expected config and weights, each path once, sorted")
    if names != sorted(set(names)):
        raise ManifestError("tensors are not sorted by name, or one stands twice")
