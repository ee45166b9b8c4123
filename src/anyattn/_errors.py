"""The exceptions anyattn raises.

::

    AnyattnError
    ├── InvalidArgument        (ValueError)           an argument that no backend could accept
    │   ├── ShapeError                                ranks, sizes, head counts that do not fit together
    │   ├── DtypeError                                dtypes that are mixed or not allowed
    │   ├── DeviceError                               tensors on different devices
    │   ├── PackingError                              offsets, lengths or masks that describe no batch
    │   ├── ContextError                              a plan or group that does not fit the call, or the other ranks
    │   └── UnknownBackend                            a backend name that does not exist
    ├── NoBackend              (RuntimeError)         valid, but nothing allowed here can run it; has .explanation
    ├── Unsupported            (NotImplementedError)  a way of calling that anyattn refuses (DTensor, torch.func, ...)
    └── MissingExtra           (ImportError)          an optional dependency is not installed

Every message says what was given, what is allowed, and what to do. All but those of a backward pass are raised
before a kernel runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anyattn._select import Explanation


class AnyattnError(Exception):
    """Base of every exception that anyattn raises on purpose."""


class InvalidArgument(AnyattnError, ValueError):
    """An argument, or a combination of them, that no backend could accept."""


class ShapeError(InvalidArgument):
    """Ranks, sizes or head counts that do not fit together."""


class DtypeError(InvalidArgument):
    """A dtype that is not allowed, or dtypes that differ where they must not."""


class DeviceError(InvalidArgument):
    """Tensors of one call that live on different devices."""


class PackingError(InvalidArgument):
    """Offsets, lengths, masks or positions that describe no batch, or not this one."""


class ContextError(InvalidArgument):
    """A context-parallel group, plan or scheme that cannot work, or does not fit the call or the other ranks."""


class UnknownBackend(InvalidArgument):
    """A backend name that anyattn does not have."""


class NoBackend(AnyattnError, RuntimeError):
    """The arguments are valid, but no backend that is allowed, installed and able takes them.

    Attributes:
        explanation: what :func:`anyattn.explain` returns for the same call, with every reason.
    """

    def __init__(self, explanation: Explanation, wish: str = "") -> None:
        text = "no backend can run this call; each says why, and what would lift it:\n" + explanation.reasons_text()
        super().__init__(f"{text}\n  {wish}" if wish else text)
        self.explanation = explanation


class Unsupported(AnyattnError, NotImplementedError):
    """A way of calling that anyattn refuses rather than answer wrongly."""


class Refused(AnyattnError, RuntimeError):
    """A kernel's own check refuses a call that its declaration allows: raised by a backend before anything runs.

    The core takes it as a reason against that kernel, for calls of these very shapes and numbers, and chooses again:
    users meet it as a :class:`NoBackend` only.

    Attributes:
        lasting: whether the next such call would be refused too; else it is asked again.
    """

    def __init__(self, text: str, *, lasting: bool = True) -> None:
        super().__init__(text)
        self.lasting = lasting


class MissingExtra(AnyattnError, ImportError):
    """A feature needs an optional dependency that is not installed."""

    def __init__(self, feature: str, extra: str, missing: str) -> None:
        super().__init__(f"{feature} needs what is not installed here, {missing}: pip install 'anyattn[{extra}]'")
