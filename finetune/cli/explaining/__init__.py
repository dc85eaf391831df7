"""Commands of ``finetune explain``, by what they look at."""
