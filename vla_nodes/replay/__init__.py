"""A recording through the live pipeline: results, reports, golden files."""
