"""The machine and the process: device, display, heartbeat, signals, distributed training."""
