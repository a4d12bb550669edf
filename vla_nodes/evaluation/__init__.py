"""Closed-loop episodes: success rates, demonstrations, metrics, contact sheets of failures."""
