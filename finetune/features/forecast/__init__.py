"""``finetune forecast``: what more images would bring, from the learning curve of those that are there."""
