"""The vision-language-action model: vision, language, SSM core, action head, checkpoints."""
