"""``python -m finetune`` is the command ``finetune``."""

from finetune.cli.app import main

if __name__ == "__main__":
    main()
