"""Lightning callbacks and torchmetrics metrics that show which part of a generative model goes wrong while it trains.

Each public name is written once, in ``__init__.pyi``, and imported when it is first used (SPEC 1).
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
__version__ = "0.1.0"
