"""What the reading list at the top stands on. Nothing here imports a file of the top level."""
