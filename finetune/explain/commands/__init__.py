"""The commands of ``finetune explain``: open a model and images, compute, draw, and write a folder."""
