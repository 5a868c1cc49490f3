__version__ = "0.1.0"


def __getattr__(name):  # on demand: `import deimv2_tfg` loads no torch
    if name == "Predictor":
        from .deployment import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
