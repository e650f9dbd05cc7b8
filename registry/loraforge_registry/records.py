"""Records of any kind: what a walk of the store needs of each (SPEC.md section 12)."""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from loraforge_registry import canonical, objects
from loraforge_registry.canonical import Value
from loraforge_registry.digest import Digest
from loraforge_registry.errors import ManifestError
from loraforge_registry.fields import typed
from loraforge_registry.files import Files
from loraforge_registry.manifest import Manifest, manifest_of
from loraforge_registry.repositories import commit_of, repository_of
from loraforge_registry.trees import tree_of


class Record(Protocol):
    """What is stored in ``manifests/``; its type says which kind it is."""

    @property
    def blobs(self) -> Mapping[Digest, int]:
        """The files it needs, with their sizes."""

    @property
    def needs(self) -> tuple[Digest, ...]:
        """The records that are there wherever it is."""

    @property
    def lineage(self) -> tuple[Digest, ...]:
        """The records that are kept as far as they are there."""


KINDS: Mapping[str, Callable[[dict[str, Value]], Record]] = {
    "loraforge.adapter": manifest_of,
    "loraforge.commit": commit_of,
    "loraforge.repository": repository_of,
    "loraforge.tree": tree_of,
}
"""How each schema is read; each reader checks its number."""


def decode_record(data: bytes) -> Record:
    """Read a record of any kind.

    Raises:
        ManifestError: not canonical, of no kind that is known here, or not as its kind should be.
    """
    fields = typed("record", canonical.decode(data), dict)
    schema = fields.get("schema")
    kind = schema.rpartition("/")[0] if isinstance(schema, str) else ""
    return KINDS.get(kind, manifest_of)(fields)


class Records:
    """Records by digest, each read and checked once: they never change."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._known: dict[Digest, Record] = {}

    def read(self, digest: Digest) -> Record:
        """Read one.

        Raises:
            NotFoundError: it is not in the store.
            StoreError, ManifestError: it is damaged.
        """
        if digest not in self._known:
            data = objects.read_all(self._files, objects.MANIFESTS, digest, canonical.MAX_BYTES)
            self._known[digest] = decode_record(data)
        return self._known[digest]

    def manifest(self, digest: Digest) -> Manifest:
        """Read the manifest of an adapter.

        Raises:
            ManifestError: it is a record of another kind.
        """
        found = self.read(digest)
        if not isinstance(found, Manifest):
            raise ManifestError(f"{digest} is a {kind_of(found)}, expected an adapter")
        return found

    def reachable(self, roots: Iterable[Digest]) -> dict[Digest, Record]:
        """Return the records that roots mean, all that these need, and what of their lineage is in the store.

        Raises:
            NotFoundError: a root, or a record that another needs, is not in the store.
            StoreError, ManifestError: one of them is damaged, so that nothing can be called garbage.
        """
        found: dict[Digest, Record] = {}
        todo = list(roots)
        while todo:
            digest = todo.pop()
            if digest not in found:
                record = found[digest] = self.read(digest)
                todo += record.needs
                todo += [parent for parent in record.lineage if has(self._files, parent)]
        return found


def by_need(needs: Mapping[Digest, Iterable[Digest]]) -> list[list[Digest]]:
    """Order records in waves: each needs only records of earlier ones, or such as are not among these."""
    waves: list[list[Digest]] = []
    left = {digest: set(needed) & set(needs) for digest, needed in needs.items()}
    while left:
        wave = [digest for digest, needed in left.items() if not needed & left.keys()]
        waves.append(wave or list(left))  # a circle cannot be made, and hangs nobody
        for digest in waves[-1]:
            del left[digest]
    return waves


def kind_of(record: Record) -> str:
    """What people call a record of this kind."""
    return "adapter" if isinstance(record, Manifest) else type(record).__name__.removesuffix("Record").lower()


def has(files: Files, digest: Digest, area: str = objects.MANIFESTS) -> bool:
    """Whether the store holds an object."""
    return files.exists(objects.shard(area, digest), digest.hex)
