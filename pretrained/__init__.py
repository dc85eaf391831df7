"""Networks that can be fine-tuned: names, weights, stages and layers; independent of data and training."""

import os

# No telemetry. The hub's client reads this at its first import, for example by timm.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
