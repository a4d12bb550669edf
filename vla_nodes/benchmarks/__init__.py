"""What the policy and the executor cost, and how they compare with others."""
