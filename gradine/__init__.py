"""gradine: progressively grown GANs on Ray, Accelerate and WebDataset."""

__version__ = "0.1.0"
