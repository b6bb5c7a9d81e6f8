"""A model behind OpenAI's chat interface, and a page to ask it."""
