"""``finetune run --budget``: the best model that so much wall-clock time of this machine buys.

::

    candidates  backbones that are here x input sizes, with a linear classifier on features
      -> search    a step of each is measured; successive halving on more and more training images
      ->           fine-tuning of the winner, where its measured step leaves time for it
      -> ledger    budget.json, budget.csv, best.yaml: written after each measurement
      -> recipe    of the winner, which ``finetune run`` then executes with the kept features

Validation and test images choose nothing.
"""
