"""What ends a run that goes wrong, and what ends one well that is asked to stop."""
