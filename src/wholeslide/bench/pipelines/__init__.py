"""From a file to a prediction: this library's way, the usual one, and the usual one with this library's means."""
