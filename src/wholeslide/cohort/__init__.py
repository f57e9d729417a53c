"""The table of slides, labels and patients; its splits, and the audit against leakage."""
