"""The definition of chai::ClusteredHeadAttention: schema, reference, function body and its cases."""
