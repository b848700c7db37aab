"""Look at a batch, a loss and its gradients before training."""
