"""Training: `loop` holds the training loop; the other modules are the functions it calls."""
