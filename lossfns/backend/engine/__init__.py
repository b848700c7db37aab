"""What a request runs: batch, passes, memory, gradients, optimizer, ranks."""
