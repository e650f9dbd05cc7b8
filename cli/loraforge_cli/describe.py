"""An artifact as JSON: the keys that scripts rely on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from loraforge_registry.canonical import Value
from loraforge_registry.digest import Digest
from loraforge_registry.layout import Layout
from loraforge_registry.manifest import Manifest, derivation_as_json
from loraforge_registry.names import RefName
from loraforge_registry.spectrum import Spectrum
from loraforge_registry.store import Store


@dataclass(frozen=True)
class Described:
    """An artifact with everything that commands print about it."""

    digest: Digest | None
    manifest: Manifest
    layout: Layout
    ref: RefName | None = None
    spectra: Mapping[str, Spectrum] | None = None

    @property
    def errors(self) -> dict[str, float]:
        """The recorded relative error by target, where the adapter was re-ranked."""
        targets = cast("dict[str, dict[str, float]]", (self.manifest.report or {}).get("targets", {}))
        return {name: row["error"] for name, row in targets.items() if "error" in row}

    @property
    def ranks(self) -> list[int]:
        """The ranks of all targets."""
        return [target.rank for target in self.layout.targets.values()]

    def as_json(self) -> dict[str, object]:
        """The document that ``--json`` prints."""
        manifest, errors = self.manifest, self.errors
        lineage = manifest.derivation.artifacts() if manifest.derivation else ()
        return {
            "digest": None if self.digest is None else str(self.digest),
            "content_id": str(manifest.content_id),
            "name": self.ref.name if self.ref else None,
            "tag": self.ref.tag if self.ref else None,
            "base": {"name": manifest.base_name, "revision": manifest.base_revision},
            "rank": max(self.ranks),
            "parameters": manifest.parameters,
            "size": manifest.size,
            "targets": {
                name: {
                    "rank": target.rank,
                    "alpha": target.alpha,
                    "scale": target.scale,
                    "kind": target.kind,
                    "shape": list(target.shape),
                    "error": errors.get(name),
                    **self._spectrum(name),
                }
                for name, target in self.layout.targets.items()
            },
            "saved": list(self.layout.extras),
            "files": {f.path: {"digest": str(f.digest), "size": f.size} for f in manifest.files},
            "derivation": None if manifest.derivation is None else derivation_as_json(manifest.derivation),
            "parents": [str(parent) for parent in lineage],
            "report": cast("Value", manifest.report),
        }

    def _spectrum(self, name: str) -> Mapping[str, object]:
        if self.spectra is None:
            return {}
        return {"spectrum": self.spectra[name].as_json() if name in self.spectra else None}


def describe(store: Store, digest: Digest, ref: RefName | None = None) -> Described:
    """Read what is known about a stored artifact."""
    manifest = store.manifest(digest)
    return Described(digest, manifest, store.layout(manifest), ref)
