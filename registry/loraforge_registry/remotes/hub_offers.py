"""What a repository holds at a commit, as an offer: the adapter at its root, or the one in a folder of a tree.

The record beside the files counts only where it is about these files.
"""

import re

from loraforge_registry.errors import FormatError, ReferenceSyntaxError
from loraforge_registry.hub_record import Record
from loraforge_registry.manifest import CONFIG_FILE, FILES, README_FILE, RECORD_FILE, WEIGHTS_FILE, File
from loraforge_registry.names import DEFAULT_TAG, RefName
from loraforge_registry.remotes.address import HubAddress
from loraforge_registry.remotes.hub_answers import COMMIT, HubFile, Snapshot
from loraforge_registry.remotes.offer import Offer, RemoteFile

MAIN = "main"


def offer_root(address: HubAddress, snapshot: Snapshot, record: Record | None) -> Offer:
    """Offer the adapter at the root of a repository, which ``check_is_adapter`` has found there."""
    where = address.at(snapshot.commit)
    notes: list[str] = []
    if record is not None and not describes(record, snapshot):
        notes.append(f"{where}: {RECORD_FILE} is about other files than are there now, so its lineage does not count")
        record = None
    files = {name: _remote_file(name, file) for name, file in snapshot.files.items() if name in FILES}
    if record is None:
        return Offer(str(where), name_for(address), tuple(files.values()), notes=tuple(notes))
    known = {file.path: file for file in record.manifest.files}
    for path in (CONFIG_FILE, WEIGHTS_FILE):
        files[path] = RemoteFile(path, files[path].size, known[path].digest, files[path].git_id)
    edited = _take_readme(files, record)
    if edited:
        notes.append(f"{where}: {README_FILE} was edited since it was pushed, so the digest is another than it was")
    return Offer(
        where=str(where),
        name=name_for(address),
        files=tuple(files.values()),
        artifact=None if edited else record.digest,
        derivation=record.manifest.derivation,
        report=record.manifest.report,
        notes=tuple(notes),
    )


def offer_folder(address: HubAddress, snapshot: Snapshot, path: str, record: Record | None) -> Offer:
    """Offer the adapter in a folder, which must be the one that the record beside it describes.

    Raises:
        FormatError: it is not, or there is none.
    """
    folder, where = f"{path}/", f"{address.at(snapshot.commit)}/{path}"
    if record is None:
        raise FormatError(f"{where}: no {RECORD_FILE}, so it is no node of a tree")
    manifest = record.manifest
    changed = [file.path for file in manifest.files if not _is_as_recorded(snapshot, folder, file, record)]
    if changed:
        raise FormatError(
            f"{where}: {', '.join(changed)} changed, or went, since the tree was pushed; pull an earlier commit "
            f"({address.repo}@COMMIT), or push the tree again"
        )
    return Offer(
        where=where,
        name=None,
        files=tuple(
            RemoteFile(file.path, file.size, file.digest, _remote_id(snapshot.files[folder + file.path]))
            for file in manifest.files
        ),
        artifact=record.digest,
        derivation=manifest.derivation,
        report=manifest.report,
        folder=folder,
    )


def check_is_adapter(address: HubAddress, snapshot: Snapshot) -> None:
    """Say what is wrong with a repository that holds no adapter.

    Raises:
        FormatError: that.
    """
    names = snapshot.files
    twins = [name for name in names if name.lower() in FILES and name not in FILES and name.lower() != "readme.md"]
    if twins:
        raise FormatError(f"{address}: {twins[0]!r} must be called {twins[0].lower()}")
    if WEIGHTS_FILE not in names and "adapter_model.bin" in names:
        raise FormatError(
            f"{address} has only adapter_model.bin, a pickle, which can run code and is never opened here; "
            "ask its author for safetensors, or, if you trust them, save it with PEFT's "
            "save_pretrained(DIR, safe_serialization=True) and push DIR"
        )
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if name not in names]
    if missing:
        deeper = sorted(name.rpartition("/")[0] for name in names if name.endswith(f"/{WEIGHTS_FILE}"))
        hint = f" (there is one in {deeper[0][:80]}/, which must be pushed on its own)" if deeper else ""
        whole = " (it has config.json: it is a whole model)" if "config.json" in names and not deeper else ""
        raise FormatError(f"{address}: no {missing[0]} at its root, so it is no PEFT adapter{hint or whole}")


def name_for(address: HubAddress) -> RefName | None:
    """What to call it here, from the repository's name and the revision."""
    name = re.sub(r"[^a-z0-9._-]+", "-", address.repo.partition("/")[2].lower())
    tag = address.revision or DEFAULT_TAG
    tag = DEFAULT_TAG if tag == MAIN or COMMIT.fullmatch(tag) else tag
    try:
        return RefName(name, tag)
    except ReferenceSyntaxError:
        return None


def describes(record: Record, snapshot: Snapshot) -> bool:
    """Whether a record is about the config and weights that are there, as far as the hub says."""
    weights, config = snapshot.files[WEIGHTS_FILE], snapshot.files[CONFIG_FILE]
    recorded = record.manifest.file(WEIGHTS_FILE)
    same_weights = weights.size == recorded.size and weights.sha256 in (None, recorded.digest)
    return same_weights and config.git_id == record.git.get(CONFIG_FILE)


def _take_readme(files: dict[str, RemoteFile], record: Record) -> bool:
    """Leave in ``files`` the README that belongs to the adapter; say whether somebody edited it on the hub."""
    there = files.pop(README_FILE, None)
    ours = next((file for file in record.manifest.files if file.path == README_FILE), None)
    if ours is None:
        return False  # what is there is a card that was written for the hub
    if there is not None and there.git_id == record.git.get(README_FILE) and there.size >= ours.size:
        skip = there.size - ours.size
        files[README_FILE] = RemoteFile(README_FILE, there.size, ours.digest, there.git_id, skip)
        return False
    if there is not None:
        files[README_FILE] = there
    return True


def _is_as_recorded(snapshot: Snapshot, folder: str, file: File, record: Record) -> bool:
    """Whether a node's file is the one of its record, as far as the hub says; its bytes are hashed when they come."""
    there = snapshot.files.get(folder + file.path)
    if there is None or there.size != file.size:
        return False
    if there.sha256 is not None:
        return there.sha256 == file.digest
    return file.path == WEIGHTS_FILE or there.git_id == record.git.get(file.path)


def _remote_id(file: HubFile) -> str | None:
    return None if file.sha256 else file.git_id


def _remote_file(path: str, file: HubFile) -> RemoteFile:
    return RemoteFile(path, file.size, file.sha256, _remote_id(file))
