"""Hugging Face Transformers: `attach(model, cache)`, then `model.generate` reuses KV.

A call that can be served looks up its prompt, puts the stored prefix into the DynamicCache that
`generate` would have made itself, lets it compute the rest and stores what is new, generated
tokens included. A call that cannot (beams, embeddings, a cache of the caller's ...) runs exactly
as without us, and one log line says why.

KV is taken at the cache layers, so shapes come from tensors and not from the config. Full layers
keep every token. Sliding layers forget what leaves their window, so what they are given is noted
during the call (`Noting`), by reference.

Transformers 5.16 to 5.24. The cache argument's name changed within; the signature tells.
"""

from lmcache_connectors.transformers.attached import Attached, attach, detach

__all__ = ["Attached", "attach", "detach"]
