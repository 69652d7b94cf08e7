"""Training the gates: data, loss, step, loop."""
