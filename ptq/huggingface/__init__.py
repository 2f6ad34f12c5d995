"""ptq checkpoints in transformers: ``from_pretrained`` reads them, ``save_pretrained`` writes them.

Imported by ``import ptq``, so this file and ``register`` import neither torch nor transformers.
"""
