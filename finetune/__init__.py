"""Fine-tune ImageNet backbones on a folder of pictures, and stand behind the number that comes out."""

import os

__version__ = "0.1.0"

# No telemetry: the hub's client reads this when it is first imported, by timm for one.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
