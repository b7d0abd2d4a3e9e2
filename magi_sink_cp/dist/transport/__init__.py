"""What moves bytes between the ranks of a cp group, asynchronously."""
