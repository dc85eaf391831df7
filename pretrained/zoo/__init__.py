"""Published networks that no library has, registered with timm: ``timm.create_model("lenet5")``.

One family a file; :mod:`pretrained.zoo.base` has what they share. Importing this package registers all names.
timm lists them as its family ``zoo``: ``timm.list_models(module="zoo")``.
"""

from importlib import import_module
from pkgutil import iter_modules

from pretrained.zoo.base import NAMES, default_cfgs

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

# timm has listed the registered names here, and they are no attributes of this package.
__all__ = ["NAMES", "default_cfgs"]
