"""Second-order and kernel regularisers for adversarial training in PyTorch."""

from hessreg._backend import backend, build_info
from hessreg.ops import project_orthogonal

__version__ = "0.1.0"
__all__ = ["__version__", "backend", "build_info", "project_orthogonal"]
