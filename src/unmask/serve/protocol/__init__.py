"""Request bodies: OpenAI's, and our own."""
