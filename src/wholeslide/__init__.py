"""Train, evaluate and run classifiers that see an entire gigapixel slide at once."""

__version__ = "0.1.0"
