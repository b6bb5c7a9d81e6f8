"""Looking into a converted set: single samples, a summary, a full check, and choosing a smaller set from it."""
