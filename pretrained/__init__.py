"""What can be fine-tuned: names, weights, networks cut into stages; nothing of data folders or training."""

import os

# No telemetry: the hub's client reads this when it is first imported, by timm for one.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
