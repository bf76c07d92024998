"""An OpenAI-compatible server over the engine, and the page to talk to it."""
