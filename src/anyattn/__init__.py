"""anyattn: one attention call for PyTorch that runs on whichever kernel is installed and fastest."""

from anyattn import (
    _log,
    integrations,  # costs nothing: the libraries are imported by register()
)
from anyattn._api import BackendStatus, attention, backends, explain
from anyattn._capability import Reason
from anyattn._context._parallel import ContextParallel
from anyattn._context._plan import ContextPlan
from anyattn._errors import (
    AnyattnError,
    ContextError,
    DeviceError,
    DtypeError,
    InvalidArgument,
    MissingExtra,
    NoBackend,
    PackingError,
    ShapeError,
    UnknownBackend,
    Unsupported,
)
from anyattn._module import Attention
from anyattn._packing import Packing
from anyattn._select import Explanation, use
from anyattn._warm_up import warm_up

__all__ = [
    "AnyattnError",
    "Attention",
    "BackendStatus",
    "ContextError",
    "ContextParallel",
    "ContextPlan",
    "DeviceError",
    "DtypeError",
    "Explanation",
    "InvalidArgument",
    "MissingExtra",
    "NoBackend",
    "Packing",
    "PackingError",
    "Reason",
    "ShapeError",
    "UnknownBackend",
    "Unsupported",
    "attention",
    "backends",
    "explain",
    "integrations",
    "use",
    "warm_up",
]
__version__ = "0.1.0"

_log.configure()
