"""What a caller holds: training, reference, sampling and service clients."""
