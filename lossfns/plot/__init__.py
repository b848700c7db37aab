"""Pictures of losses: what a loss and its gradient are over the quantity that it sees."""
