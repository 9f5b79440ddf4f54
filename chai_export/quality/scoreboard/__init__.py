"""Ways to make a KV cache smaller, ours and others', side by side at equal bytes."""
