"""What transformers needs to know this project's models: configuration, model, processor, and the exported folder."""
