"""`wegeft serve`: models by name behind an OpenAI-compatible server of transformers or vLLM."""
