"""Prompt-set curation (k1.5 section 2.1): what is known of a prompt, and what decides whether it stays."""
