"""A trained model in the shapes that other programs read, and models of others as a start."""
