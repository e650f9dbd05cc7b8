"""A base checkpoint on disk, read as a stream: one safetensors file, or shards with an index.

Tensors are read by ``preadv`` into buffers of the caller, never mapped: a mapping of a file that shrinks kills the
process, and one of a file that changes shows both versions. Every file's size and time stamps are taken at the opening
and compared again by ``check_unchanged``.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from loraforge.errors import ConflictError, FormatError, InputOutputError, NotFoundError
from loraforge_registry import strict_json
from loraforge_registry.header import Header, TensorEntry, read_header
from loraforge_registry.ingest import open_source, read_small
from loraforge_registry.paths import AnyPath, expand
from loraforge_registry.system import named_error

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ASIDE = ".merging"
"""What an in-place merge puts behind the names of the files it is writing, so that no loader takes them."""
MAX_INDEX = 64 * 1024 * 1024
MAX_SHARDS = 10_000
_CUT_OFF = "an in-place merge was cut off here; run the same loraforge merge or unmerge again to finish it"


@dataclass(frozen=True, slots=True)
class Stamp:
    """What a file is known by while it is read: a change of any of these means that it is another."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, fd: int) -> "Stamp":
        """Take the stamp of an open file."""
        found = os.fstat(fd)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class Shard:
    """One open safetensors file of a checkpoint."""

    path: Path
    fd: int
    header: Header
    stamp: Stamp

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name


@dataclass(frozen=True, slots=True)
class TensorAt:
    """A tensor and where it lies: ``begin`` is bytes from the start of its shard's file."""

    entry: TensorEntry
    shard: str
    begin: int

    @property
    def nbytes(self) -> int:
        """The size of its data."""
        return self.entry.end - self.entry.begin

    @property
    def itemsize(self) -> int:
        """The bytes of one element; 0 for what is smaller than a byte."""
        return self.nbytes // self.entry.elements if self.entry.elements else 0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An open checkpoint: shards by file name, and tensors by name, both in file order.

    ``others`` are the remaining regular files in and below its directory, by path from there, but for hidden
    directories; none where a single file was opened.
    """

    path: Path
    shards: Mapping[str, Shard]
    tensors: Mapping[str, TensorAt] = field(repr=False)
    others: tuple[str, ...] = ()

    def read_into(self, tensor: TensorAt, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the tensor's bytes from ``offset`` on.

        Raises:
            InputOutputError: the file cannot be read, or ends early.
        """
        shard = self.shards[tensor.shard]
        position, rest = tensor.begin + offset, buffer
        while rest:
            try:
                count = os.preadv(shard.fd, [rest], position)
            except OSError as error:
                raise named_error(error, shard.path) from error
            if count == 0:
                raise InputOutputError(f"{shard.path} was cut short while it was read: tensor {tensor.entry.name!r}")
            position, rest = position + count, rest[count:]

    def check_unchanged(self) -> None:
        """Refuse if a shard has changed since it was opened.

        Raises:
            ConflictError: naming the file.
        """
        for shard in self.shards.values():
            if Stamp.of(shard.fd) != shard.stamp:
                raise ConflictError(f"{shard.path} changed while it was read; try again when nobody writes to it")

    @property
    def nbytes(self) -> int:
        """The size of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@contextmanager
def open_checkpoint(source: AnyPath, *, aside: bool = False) -> Iterator[Checkpoint]:
    """Open a checkpoint directory, or a single ``.safetensors`` file.

    A directory holds ``model.safetensors``, or ``model.safetensors.index.json`` with its shards, or exactly one other
    ``.safetensors`` file. With ``aside``, files that an in-place merge has put aside count as what they were.

    Cost: reads the headers and the index.

    Raises:
        NotFoundError: no checkpoint is there.
        FormatError: a header or the index is refused, or they contradict each other.
    """
    path = expand(source)
    with ExitStack() as stack:
        directory, names, weight_map = _find(path, aside=aside)
        shards = {name: _open_shard(stack, _where(directory / name, aside=aside)) for name in names}
        tensors: dict[str, TensorAt] = {}
        for name, shard in shards.items():
            for entry in shard.header.tensors:
                if entry.name in tensors:
                    raise FormatError(
                        f"{path}: tensor {entry.name!r} is in {tensors[entry.name].shard} and in {name}, expected once"
                    )
                tensors[entry.name] = TensorAt(entry, name, shard.header.data_start + entry.begin)
        if weight_map is not None:
            _check_map(path, weight_map, tensors)
        yield Checkpoint(path, shards, tensors, _others(path, set(shards)))


def read_index(path: Path) -> dict[str, str]:
    """Return the weight map of an index: tensor name to shard name.

    Raises:
        FormatError: malformed, or a shard that is not a plain file name ending in ``.safetensors``.
    """
    try:
        document = strict_json.loads(read_small(path, MAX_INDEX), max_bytes=MAX_INDEX, max_depth=8)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path}: expected an object with a weight_map of tensor names to files")
    found: dict[str, str] = {}
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard.endswith(".safetensors") and shard == os.path.basename(shard)  # noqa: PTH119 - a string from a file, no path of ours
        if not isinstance(shard, str) or not plain or shard.startswith(".") or not shard.isprintable():
            raise FormatError(
                f"{path}: tensor {name!r} is said to be in {str(shard)[:80]!r}, expected a file beside it"
            )
        found[name] = shard
    if len(set(found.values())) > MAX_SHARDS:
        raise FormatError(f"{path}: {len(set(found.values()))} shards; the limit is {MAX_SHARDS}")
    return found


def _where(path: Path, *, aside: bool) -> Path:
    other = path.with_name(path.name + ASIDE)
    if not aside and other.exists() and not path.exists():
        raise NotFoundError(f"{path.parent}: {_CUT_OFF}")
    return other if aside and other.exists() else path


def _find(path: Path, *, aside: bool) -> tuple[Path, list[str], dict[str, str] | None]:
    """Return the directory, its shards' names and the index's weight map, if it has one."""
    try:
        if not path.exists():
            raise NotFoundError(f"{path}: no such file or directory")
        if not path.is_dir():
            return path.parent, [path.name], None
        names = sorted({name.removesuffix(ASIDE) if aside else name for name in os.listdir(path)})
    except OSError as error:
        if isinstance(error, InputOutputError):
            raise
        raise named_error(error, path) from error
    if SINGLE in names:
        return path, [SINGLE], None
    if INDEX in names:
        weight_map = read_index(path / INDEX)
        return path, sorted(set(weight_map.values())), weight_map
    candidates = [name for name in names if name.endswith(".safetensors") and name != "adapter_model.safetensors"]
    if len(candidates) == 1:
        return path, candidates, None
    raise NotFoundError(f"{path}: {_why_not(names, candidates)}")


def _why_not(names: list[str], candidates: list[str]) -> str:
    if len(candidates) > 1:
        return f"{len(candidates)} safetensors files but no {INDEX}, so which belong together is unknown"
    if any(name.endswith(ASIDE) for name in names):
        return _CUT_OFF
    if "adapter_config.json" in names:
        return "this is an adapter, expected the checkpoint of a base model"
    if any(name.startswith("pytorch_model") for name in names):
        return "its weights are pickles, which are never opened here; save it with safe_serialization=True"
    return f"no {SINGLE} and no {INDEX} there, so it is no checkpoint"


def _open_shard(stack: ExitStack, path: Path) -> Shard:
    fd = stack.enter_context(open_source(path))
    stamp = Stamp.of(fd)
    try:
        return Shard(path, fd, read_header(fd), stamp)
    except FormatError as error:
        raise type(error)(f"{path}: {error}") from error
    except OSError as error:
        raise named_error(error, path) from error


def _check_map(path: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorAt]) -> None:
    """An index and its shards hold the same tensors at the same places."""
    for name in sorted(set(weight_map) | set(tensors)):
        said = weight_map.get(name)
        found = tensors[name].shard if name in tensors else None
        if said != found:
            raise FormatError(f"{path}: the index puts tensor {name!r} in {said}, it is in {found}")


def _others(path: Path, shards: set[str]) -> tuple[str, ...]:
    found = []
    for folder, inside, names in os.walk(path):  # of a single file there is nothing to walk
        inside[:] = [name for name in inside if not name.startswith(".")]
        found += [Path(folder, name) for name in names]
    relative = [str(file.relative_to(path)) for file in found if file.is_file()]
    return tuple(sorted(name for name in relative if name not in shards))
