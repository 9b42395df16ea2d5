"""What the training of adapters and of compressed models share: recipes, signals, checkpoints, seeds."""
