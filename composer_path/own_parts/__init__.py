"""Parts of one's own: classes from modules that a YAML imports, or from installed packages."""
