"""From raw files to batches: formats, pieces to ids and labels, the data set on disk, the order of training."""
