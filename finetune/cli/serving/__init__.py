"""The commands of the service: ``finetune serve`` and ``finetune jobs``."""
