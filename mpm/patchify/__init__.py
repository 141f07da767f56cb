"""Images to patches, which of them are hidden, and patches to tokens."""
