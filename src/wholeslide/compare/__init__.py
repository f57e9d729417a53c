"""Methods compared fairly: the same folds, seeds, budget and rule of selection for all, and statistics that were fixed before."""
