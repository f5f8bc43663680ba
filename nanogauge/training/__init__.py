"""What the training loop is made of: data, schedule, optimizer, checkpoints."""
