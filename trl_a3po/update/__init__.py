"""The update: the gradients of `GRPOTrainer`, computed from fewer positions."""
