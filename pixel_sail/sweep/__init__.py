"""Many runs from one command: the jobs of a grid of overrides, run, continued and summed up.

Beside training and evaluation, which it starts as commands of their own and never imports.
"""
