"""A synthetic cohort whose classes differ only in arrangement."""
