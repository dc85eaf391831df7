"""``finetune audit``: can the label be predicted from what should not tell it?"""
