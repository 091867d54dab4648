"""Images: data sets, folders, splits, batches."""
