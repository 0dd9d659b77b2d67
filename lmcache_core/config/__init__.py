"""Config: YAML with positions, the environment, LMCache's settings, and the models they end in."""
