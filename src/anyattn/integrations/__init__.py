"""anyattn inside other libraries. Each module imports its library only when ``register()`` is called."""

from anyattn.integrations import transformers

__all__ = ["transformers"]
