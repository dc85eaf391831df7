"""Fine-tune ImageNet backbones on a folder of pictures, and stand behind the number that comes out."""

__version__ = "0.1.0"
