"""Training: `loop` is the run, top to bottom; the other files are the verbs it calls."""
