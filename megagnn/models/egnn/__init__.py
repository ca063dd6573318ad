"""The E(n)-equivariant graph network: configuration, layers, work and traffic."""
