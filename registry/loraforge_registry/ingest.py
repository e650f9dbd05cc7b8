"""A directory of files becomes an artifact: checked by the gates, hashed while it is stored."""

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from blake3 import blake3

from loraforge_registry import config as adapter_config
from loraforge_registry import objects
from loraforge_registry.canonical import Value
from loraforge_registry.config import AdapterConfig, parse_config
from loraforge_registry.digest import Digest
from loraforge_registry.errors import ConflictError, FormatError, ManifestError, NotFoundError
from loraforge_registry.files import Files
from loraforge_registry.header import Header, read_header
from loraforge_registry.layout import Layout, content_id, read_layout
from loraforge_registry.manifest import (
    CONFIG_FILE,
    FILES,
    README_FILE,
    WEIGHTS_FILE,
    Artifact,
    Derivation,
    File,
    Manifest,
    Tensor,
    encode_manifest,
)
from loraforge_registry.sessions import Session
from loraforge_registry.system import Buffer, named_error, read_chunks

MAX_README = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Incoming:
    """The files of one adapter, about to be stored: ``chunks`` is the whole weights file in order.

    ``weights`` is the digest that they must have, where that is known before they come.
    """

    config: bytes
    header: Header
    chunks: Iterable[Buffer]
    readme: bytes | None = None
    weights: Digest | None = None


@dataclass(frozen=True, slots=True)
class AdapterPaths:
    """The files of a PEFT directory that make the adapter, and the names of those that do not."""

    config: Path
    weights: Path
    readme: Path | None
    left_out: tuple[str, ...]


def find_adapter(source: Path) -> AdapterPaths:
    """Find an adapter's files in a PEFT directory, or beside a safetensors file.

    Raises:
        NotFoundError: no such path, or a file of an adapter is missing there.
        FormatError: only a pickle is there.
    """
    try:
        is_directory = stat.S_ISDIR(source.stat().st_mode)
    except FileNotFoundError as error:
        raise NotFoundError(f"{source}: no such file or directory") from error
    except OSError as error:
        raise named_error(error, source) from error
    except ValueError as error:  # a NUL in the name
        raise FormatError(f"{str(source)!r}: {error}") from error
    directory = source if is_directory else source.parent
    weights = directory / WEIGHTS_FILE if is_directory else source
    if not os.path.lexists(weights):
        pickle = directory / "adapter_model.bin"
        if pickle.exists():
            raise FormatError(
                f"{pickle} is a pickle, which can run code and is never opened here; save it with PEFT's "
                "save_pretrained(..., safe_serialization=True)"
            )
        raise NotFoundError(f"{source}: no {WEIGHTS_FILE} there, so it is no PEFT adapter")
    names = sorted(os.listdir(directory))
    twins = [name for name in names if name.lower() == CONFIG_FILE and name != CONFIG_FILE]
    if twins:
        raise FormatError(f"{directory / twins[0]}: rename it to {CONFIG_FILE}, or remove it")
    if CONFIG_FILE not in names:
        raise NotFoundError(f"{source}: no {CONFIG_FILE} beside its tensors, so their scale is unknown")
    readme = directory / README_FILE
    return AdapterPaths(
        config=directory / CONFIG_FILE,
        weights=weights,
        readme=readme if readme.is_file() else None,
        left_out=tuple(name for name in names if name not in FILES and name != weights.name),
    )


@contextmanager
def open_adapter(source: Path) -> Iterator[Incoming]:
    """Open a PEFT directory, or a safetensors file with its config beside it, for ``ingest``.

    Raises:
        NotFoundError, FormatError: as ``find_adapter``; and the gates' errors, with the path in front.
    """
    paths = find_adapter(source)
    with open_source(paths.weights) as fd:
        try:
            header = read_header(fd)
        except FormatError as error:
            raise type(error)(f"{paths.weights}: {error}") from error
        except OSError as error:
            raise named_error(error, paths.weights) from error
        yield Incoming(
            config=read_small(paths.config, adapter_config.MAX_BYTES),
            header=header,
            chunks=_reading(paths.weights, read_chunks(fd)),
            readme=None if paths.readme is None else read_small(paths.readme, MAX_README),
        )


def ingest(
    files: Files,
    session: Session,
    incoming: Incoming,
    *,
    derivation: Derivation | None = None,
    report: Mapping[str, Value] | None = None,
    expected: Digest | None = None,
) -> Artifact:
    """Check, hash and store one adapter; every object is durable when this returns.

    ``expected`` is the artifact that it must be; ``incoming.weights`` must be known for that.

    Raises:
        FormatError: the config, the header, or the two together are refused, or it is another artifact than
            ``expected``; nothing is stored.
        DigestMismatchError: the weights are not those that were announced; nothing is stored.
        ConflictError: the weights changed while they were read.
    """
    manifest_of = partial(_manifest, *_check(incoming), derivation=derivation, report=report)
    try:
        encode_manifest(manifest_of(*_placeholders(incoming)))  # what cannot be recorded is refused before a write
    except ManifestError as error:
        raise FormatError(f"no manifest can hold its {len(incoming.header.tensors)} tensors: {error}") from error
    hasher = TensorHasher(incoming.header)

    def check() -> None:
        hasher.check_complete()
        if expected is not None:
            _check_artifact(manifest_of(hasher.tensors, _files(incoming)), expected)

    weights, size = objects.put(
        files, session, objects.BLOBS, incoming.chunks, expected=incoming.weights, observe=hasher.feed, check=check
    )
    stored = [File(WEIGHTS_FILE, weights, size)]
    for path, data in _small_files(incoming):
        digest, size = objects.put(files, session, objects.BLOBS, [data])
        stored.append(File(path, digest, size))
    manifest = manifest_of(hasher.tensors, stored)
    digest, _ = objects.put(files, session, objects.MANIFESTS, [encode_manifest(manifest)])
    return Artifact(digest, manifest.content_id)


def examine(incoming: Incoming, *, weights: File | None = None) -> tuple[Manifest, Layout]:
    """Return the manifest and layout that an adapter would have in a store; nothing is written.

    ``weights`` is the file of the weights, where it is stored and its digest known: then only the tensors are hashed.

    Raises:
        FormatError, ConflictError: as ``ingest``.
    """
    config, layout = _check(incoming)
    hasher, sha256 = TensorHasher(incoming.header), hashlib.sha256()
    size = 0
    for chunk in incoming.chunks:
        hasher.feed(chunk)
        size += memoryview(chunk).nbytes
        if weights is None:
            sha256.update(chunk)
    files = [weights or File(WEIGHTS_FILE, Digest("sha256", sha256.hexdigest()), size)]
    files += [File(path, Digest.of(data), len(data)) for path, data in _small_files(incoming)]
    hasher.check_complete()
    return _manifest(config, layout, hasher.tensors, files), layout


class TensorHasher:
    """BLAKE3 of every tensor of a safetensors file that goes by in chunks."""

    def __init__(self, header: Header) -> None:
        self._start = len(header.raw).to_bytes(8, "little") + header.raw
        self._seen = bytearray()
        self._pending = list(reversed(header.tensors))
        self._hash = blake3()
        self._position = 0
        self._done: list[Tensor] = []

    def feed(self, chunk: Buffer) -> None:
        """Take the next bytes of the file."""
        rest = memoryview(chunk).cast("B")
        if len(self._seen) < len(self._start):
            taken = min(len(self._start) - len(self._seen), len(rest))
            self._seen += rest[:taken]
            rest = rest[taken:]
        while rest and self._pending:
            entry = self._pending[-1]
            piece = rest[: entry.end - self._position]
            self._hash.update(piece)
            self._position += len(piece)
            rest = rest[len(piece) :]
            self._close_finished()
        if rest:
            raise ConflictError("the weights file grew while it was read; try again when nobody writes to it")

    def check_complete(self) -> None:
        """Refuse if the bytes that went by are not the file whose header was checked.

        Raises:
            ConflictError: they ended early, or their header is another.
        """
        self._close_finished()
        if self._pending or bytes(self._seen) != self._start:
            raise ConflictError("the weights file changed while it was read; try again when nobody writes to it")

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that have gone by, with their digests."""
        return self._done

    def _close_finished(self) -> None:
        while self._pending and self._pending[-1].end == self._position:
            entry = self._pending.pop()
            self._done.append(Tensor(entry, Digest.from_raw("blake3", self._hash.digest())))
            self._hash = blake3()


def _check(incoming: Incoming) -> tuple[AdapterConfig, Layout]:
    config = parse_config(incoming.config)
    return config, read_layout(config, incoming.header.tensors)


def _files(incoming: Incoming) -> list[File]:
    """The files as the manifest will list them; the digest of the weights must be known."""
    if incoming.weights is None:
        raise ManifestError("which artifact this is cannot be said before its weights have come")
    small = [File(path, Digest.of(data), len(data)) for path, data in _small_files(incoming)]
    return [File(WEIGHTS_FILE, incoming.weights, incoming.header.size), *small]


def _check_artifact(manifest: Manifest, expected: Digest) -> None:
    found = Digest.of(encode_manifest(manifest))
    if found != expected:
        raise ManifestError(f"its files make the artifact {found}, it was announced as {expected}")


def _small_files(incoming: Incoming) -> list[tuple[str, bytes]]:
    readme = [] if incoming.readme is None else [(README_FILE, incoming.readme)]
    return [(CONFIG_FILE, incoming.config), *readme]


def _placeholders(incoming: Incoming) -> tuple[list[Tensor], list[File]]:
    """Tensors and files as a manifest will list them, before their digests are known."""
    nothing = bytes(32)
    tensors = [Tensor(entry, Digest.from_raw("blake3", nothing)) for entry in incoming.header.tensors]
    paths = [WEIGHTS_FILE, *(path for path, _ in _small_files(incoming))]
    return tensors, [File(path, Digest.from_raw("sha256", nothing), 2**53) for path in paths]


def _manifest(
    config: AdapterConfig,
    layout: Layout,
    tensors: list[Tensor],
    files: list[File],
    *,
    derivation: Derivation | None = None,
    report: Mapping[str, Value] | None = None,
) -> Manifest:
    return Manifest(
        content_id=content_id(layout, [(tensor.entry, tensor.digest) for tensor in tensors]),
        files=tuple(sorted(files, key=lambda file: file.path)),
        tensors=tuple(sorted(tensors, key=lambda tensor: tensor.entry.name)),
        base_name=config.settings.base_name,
        base_revision=config.settings.base_revision,
        derivation=derivation,
        report=report,
    )


@contextmanager
def open_source(path: Path) -> Iterator[int]:
    """Open a user's file; a link is followed (a Hub cache is made of them), a FIFO or device is refused."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise NotFoundError(f"{path}: no such file") from error
    except OSError as error:
        raise named_error(error, path) from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise FormatError(f"{path}: not a regular file")
        yield fd
    finally:
        os.close(fd)


def _reading(path: Path, chunks: Iterable[Buffer]) -> Iterator[Buffer]:
    """Pass chunks on; an error of reading them names the file, which others that share the block do not."""
    try:
        yield from chunks
    except OSError as error:
        raise named_error(error, path) from error


def read_small(path: Path, limit: int) -> bytes:
    """Read a user's small file whole.

    Raises:
        FormatError: it is larger than ``limit``.
    """
    with open_source(path) as fd:
        size = os.fstat(fd).st_size
        if size > limit:
            raise FormatError(f"{path}: {size} bytes; the limit is {limit}")
        return os.pread(fd, limit, 0)
