"""A look at records and pictures before they are converted."""
