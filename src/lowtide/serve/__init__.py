"""An OpenAI-compatible endpoint on this machine."""
