"""Before a run: what it takes, and what can be measured or computed once for all."""
