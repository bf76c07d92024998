"""The architecture: configuration, layers and the transformer."""
