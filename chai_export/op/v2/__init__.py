"""The op's version 2: caches in pages, in the precision that a plan chooses (docs/op-v2.md)."""
