"""A loss in other contracts: a service's datums, its built-ins, a gradient by token."""
