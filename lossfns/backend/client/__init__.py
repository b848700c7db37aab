"""The clients: training, reference, sampling and service, with the calls of the hosted services."""
