"""The bundle on disk: manifest, hashes, atomic writes, loading."""
