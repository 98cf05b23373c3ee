"""Templates of questions, answers and evaluation prompts, one module per task.

`data/sources/` fills the templates for training, `evaluation/` uses the constant prompts. Templates are our own;
constants marked "released" are part of the protocol with which a published checkpoint was trained or evaluated.
Example: `referring.REFER_ANSWERS[0]` is "It is [SEG].".
"""
