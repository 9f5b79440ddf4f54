"""The rewrite: attention subgraphs become ClusteredHeadAttention nodes."""
