"""What KV is, and whose: the content of a model's tensors."""
