"""Training of gated networks: configuration, networks, data, objective, and runs that can be interrupted."""
