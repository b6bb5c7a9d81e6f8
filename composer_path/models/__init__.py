"""The architecture: vision encoder, projector, language model, and the two classes that put them together."""
