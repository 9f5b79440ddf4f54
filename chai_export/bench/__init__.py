"""Speed and bytes: the op alone, a bundle's generation, its memory; against the peers that are installed."""
