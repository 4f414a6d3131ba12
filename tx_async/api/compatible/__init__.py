"""OpenAI's and Anthropic's ways to talk to a checkpoint."""
