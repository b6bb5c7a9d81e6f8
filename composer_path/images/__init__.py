"""Image files, pixels, finished squares and stored features."""
