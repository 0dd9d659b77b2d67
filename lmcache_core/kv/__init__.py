"""What KV is: chunk, keys, namespace, layout, tensors."""
