"""Agreement of the ranks on what they are about to do, and what happens when one does not come."""
