"""Records and images to shards: who converts what, where it goes, and that nothing half-done is ever published."""
