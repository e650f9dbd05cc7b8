"""Content-addressed storage for adapters: digests, manifests, the store. No torch, no numpy."""
