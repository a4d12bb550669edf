"""The instruction encoder, distilled from a sentence model."""
