"""DeepRec: an LLM that explores an item catalog through a recommendation model, then ranks.

Importing this package loads nothing heavy: neither torch nor vllm, nor a model.
"""

__version__ = "0.1.0"
