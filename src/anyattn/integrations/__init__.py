"""anyattn inside other libraries. Each module imports its library only when ``register()`` is called, or never."""

from anyattn.integrations import diffusers, transformer_engine, transformers

__all__ = ["diffusers", "transformer_engine", "transformers"]
