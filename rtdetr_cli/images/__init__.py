"""Images: decode, augment and draw."""
