"""The network, read beside the paper: blocks (3.2), backbones and cascades (3.1, 4.3)."""
