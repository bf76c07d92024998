"""Model families as published on Hugging Face: config keys and tensor names."""
