"""How tasks are asked and answered: one module per task with its questions, its answers and its evaluation prompts.

`data/sources/` fills the templates for training, `evaluation/` the constant prompts. Templates are our own; constants
marked "released" are protocol facts that a published checkpoint was trained or scored with. Example:
`referring.REFER_ANSWERS[0]` is "It is [SEG].".
"""
