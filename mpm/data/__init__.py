"""Images: reading, sources, views, batches."""
