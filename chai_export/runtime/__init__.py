"""The runner: sessions, caches, sampling and the generation loop."""
