"""vLLM: a KV connector, and a tier behind vLLM's own CPU offloading.

`connector.py` is vLLM's face of the one, `tier.py` of the other. Nothing is imported here: vLLM
loads `vllm_plugin.py`, which counts changes of weights, before there is anything to connect.
"""
