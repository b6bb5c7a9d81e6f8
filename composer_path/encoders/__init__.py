"""Public vision encoders by name: what their cards, papers and repositories say of them, as plain data."""
