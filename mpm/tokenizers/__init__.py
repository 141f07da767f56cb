"""Images to codes: what a masked objective can predict in place of pixels."""
